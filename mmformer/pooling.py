"""Token sequences to one vector a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmformer.tokens import Tokens, modality_id


def mean_by_sample(
    tokens: Tokens, modalities: Sequence[str] | None = None
) -> tuple[Float[Tensor, "N D"], Bool[Tensor, " N"]]:
    """The mean of each sample's tokens, of the named modalities or all, and which samples have any; zeros elsewhere."""
    chosen = tokens.valid
    if modalities is not None:
        named = torch.zeros_like(chosen)
        for name in modalities:
            named = named | (tokens.modality == modality_id(name))
        chosen = chosen & named
    weight = chosen.to(tokens.x.dtype)
    if tokens.layout is None:
        total = (tokens.x * weight[..., None]).sum(1)
        count = weight.sum(1)
    else:
        sample = tokens.sample()[0].clamp(min=0)
        total = tokens.x.new_zeros(tokens.num_samples, tokens.x.shape[-1])
        total = total.index_add(0, sample, tokens.x[0] * weight[0][:, None])
        count = tokens.x.new_zeros(tokens.num_samples).index_add(0, sample, weight[0])
    return total / count.clamp(min=1)[:, None], count > 0


class MeanPool(nn.Module):
    """The mean over a sample's tokens of the named modalities (all where none is named)."""

    def __init__(self, modalities: Sequence[str] | None = None):
        super().__init__()
        self.modalities = modalities

    def forward(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        return mean_by_sample(tokens, self.modalities)[0]


class _ByModality(nn.Module):
    """A mean for each modality, with a learned vector where a sample lacks it."""

    def __init__(self, dim: int, modalities: Sequence[str]):
        super().__init__()
        self.modalities = list(modalities)
        self.absent = nn.ParameterDict({name: torch.randn(dim) * 0.02 for name in self.modalities})

    def forward(self, tokens: Tokens) -> list[Float[Tensor, "N D"]]:
        means = []
        for name in self.modalities:
            mean, present = mean_by_sample(tokens, [name])
            means.append(torch.where(present[:, None], mean, self.absent[name].to(mean.dtype)))
        return means


class ConcatenationPool(nn.Module):
    """Late fusion: the modalities' means side by side, mapped back to `dim` channels by a two-layer perceptron."""

    def __init__(self, dim: int, modalities: Sequence[str]):
        super().__init__()
        self.means = _ByModality(dim, modalities)
        self.mix = nn.Sequential(nn.Linear(dim * len(modalities), 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        return self.mix(torch.cat(self.means(tokens), -1))


class LowRankPool(nn.Module):
    """Low-rank tensor fusion (arXiv 1806.00064, eq. 7): the outer product of the modalities' means, never formed."""

    def __init__(self, dim: int, modalities: Sequence[str], rank: int):
        super().__init__()
        self.means = _ByModality(dim, modalities)
        self.factors = nn.ModuleList(nn.Linear(dim, rank * dim) for _ in modalities)  # its bias is the appended 1
        self.weights = nn.Parameter(torch.full((rank,), rank**-0.5))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        product = None
        for factor, mean in zip(self.factors, self.means(tokens), strict=True):
            mapped = factor(mean).unflatten(-1, (len(self.weights), -1))
            product = mapped if product is None else product * mapped
        assert product is not None
        return torch.einsum("nrd,r->nd", product, self.weights) + self.bias
