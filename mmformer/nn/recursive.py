"""A layer applied several times over, with a little of its own for each pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmformer.tokens import Tokens
from mmformer.visibility import Sights


class Recursive(nn.Module):
    """One layer in the place of `times`: pass i has its matrices plus a product of rank `rank`, W + B_i A_i.

    Relaxed recursive Transformers (arXiv 2410.20672, section 2.3). Vectors (norms, biases) are cheap: each pass has its
    own, as what it adds to the common one. All that is added starts at 0, so a new one is the layer `times` times over
    (`Looped`); at full rank it can be any `times` layers (`from_layers`).

    Raises:
        ValueError: less than one pass, or a rank below 0.
    """

    def __init__(self, dim: int, layer: Callable[[int], nn.Module], times: int, rank: int):
        super().__init__()
        if times < 1 or rank < 0:
            raise ValueError(f"{times} passes at rank {rank}: give at least one pass, and a rank of 0 or more")
        self.shared = layer(dim)
        self.passes = nn.ModuleList(Relaxation(self.shared, rank) for _ in range(times))

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights, cross_sights: Sights | None) -> Tokens:
        given = (tokens, context, sights, cross_sights)
        for relaxation in self.passes:
            tokens = functional_call(self.shared, relaxation(self.shared), given)
            given = (tokens, context, sights, cross_sights)
        return tokens

    @classmethod
    @torch.no_grad()
    def from_layers(cls, layers: Sequence[nn.Module], rank: int, dim: int) -> Recursive:
        """The nearest one to layers of the same form: their mean, and of what each has beside it the first ranks (SVD).

        The given layers are left as they are. At full rank it computes what they do.
        """
        from copy import deepcopy

        made = cls(dim, lambda _: deepcopy(layers[0]), len(layers), rank)
        common = dict(made.shared.named_parameters())
        for name, parameter in common.items():
            parameter.copy_(torch.stack([layer.get_parameter(name) for layer in layers]).mean(0))
        for relaxation, layer in zip(made.passes, layers, strict=True):
            assert isinstance(relaxation, Relaxation)
            relaxation.fit({name: layer.get_parameter(name) - parameter for name, parameter in common.items()})
        return made


class Relaxation(nn.Module):
    """What one pass adds to the parameters of a layer: a product of two thin matrices, or a vector.

    Parameters of more than two dimensions are common to all passes.
    """

    def __init__(self, layer: nn.Module, rank: int):
        super().__init__()
        self.up, self.down, self.vectors = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, parameter in layer.named_parameters():
            if parameter.ndim == 1:
                self.vectors[_key(name)] = nn.Parameter(torch.zeros_like(parameter))
            elif parameter.ndim == 2 and rank:
                rows, columns = parameter.shape
                thin = min(rank, rows, columns)
                self.up[_key(name)] = nn.Parameter(parameter.new_zeros(rows, thin))
                self.down[_key(name)] = nn.Parameter(torch.randn(thin, columns).to(parameter) * columns**-0.5)

    def forward(self, layer: nn.Module) -> dict[str, Tensor]:
        """The parameters of the layer in this pass, by name."""
        return {name: parameter + self._added(_key(name)) for name, parameter in layer.named_parameters()}

    def _added(self, key: str) -> Tensor | float:
        if key in self.vectors:
            return self.vectors[key]
        return self.up[key] @ self.down[key] if key in self.up else 0.0

    def fit(self, differences: dict[str, Tensor]) -> None:
        """Take over differences from the layer, matrices as far as the rank goes (Eckart and Young)."""
        for name, difference in differences.items():
            key = _key(name)
            if key in self.vectors:
                self.vectors[key].copy_(difference)
            elif key in self.up:
                thin = self.up[key].shape[1]
                left, sizes, right = torch.linalg.svd(difference, full_matrices=False)
                self.up[key].copy_(left[:, :thin] * sizes[:thin])
                self.down[key].copy_(right[:thin])


def _key(name: str) -> str:
    """A parameter's name without dots, which the names of modules' parameters cannot hold."""
    return name.replace(".", "/")
