"""Weights of their own for some modalities, in a layer that all share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.tokens import Tokens, is_one_of

OTHERS = "others"


class ByModality(nn.Module):
    """A feed-forward map or a norm with a copy for each of `modalities`, and one more for the tokens of all others.

    The multiway Transformer of VLMo and BEiT-3 (arXiv 2208.10442), and the queries of BLIP-2's Q-Former.
    """

    def __init__(self, dim: int, part: Callable[[int], nn.Module], modalities: Sequence[str]):
        super().__init__()
        self.parts = nn.ModuleDict({name: part(dim) for name in [*modalities, OTHERS]})

    def forward(self, tokens: Tokens) -> Float[Tensor, "B T D"]:
        *named, _ = self.parts
        if not named:
            return self.parts[OTHERS](tokens.x)
        if tokens.layout is None:
            out = self.parts[OTHERS](tokens.x)
            for name in named:
                out = torch.where(is_one_of(tokens, [name])[..., None], self.parts[name](tokens.x), out)
            return out
        flat, chosen = tokens.x[0], [is_one_of(tokens, [name])[0] for name in named]
        chosen.append(~torch.stack(chosen).any(0))
        where = [mask.nonzero()[:, 0] for mask in chosen]
        parts = [part(flat.index_select(0, index)) for part, index in zip(self.parts.values(), where, strict=True)]
        return torch.cat(parts).index_select(0, torch.cat(where).argsort())[None]


def apply(part: nn.Module, tokens: Tokens) -> Float[Tensor, "B T D"]:
    """A map of vectors, or one that must know whose vectors they are, applied to tokens."""
    return part(tokens) if isinstance(part, ByModality) else part(tokens.x)
