"""What can stand around the attention or the feed-forward map of a residual branch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.tokens import Tokens
from mmformer.visibility import Sights

Factory = Callable[[int], nn.Module]


class Scaled(nn.Module):
    """A branch with a learned factor for each channel, `initial` at the start (LayerScale, arXiv 2103.17239)."""

    def __init__(self, dim: int, part: Factory, initial: float):
        super().__init__()
        self.part = part(dim)
        self.scale = nn.Parameter(torch.full((dim,), initial))

    def forward(self, *inputs) -> Float[Tensor, "*B D"]:
        return self.part(*inputs) * self.scale


class Gated(nn.Module):
    """A branch times tanh of a learned number that starts at 0, so that it is silent at first (arXiv 2204.14198)."""

    def __init__(self, dim: int, part: Factory):
        super().__init__()
        self.part = part(dim)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, *inputs) -> Float[Tensor, "*B D"]:
        return self.part(*inputs) * self.gate.tanh()


class ContextNorm(nn.Module):
    """Cross-attention whose context of `context_dim` channels is normalised first (Perceiver, CoCa)."""

    def __init__(self, dim: int, part: Factory, context_dim: int, norm: Factory = nn.LayerNorm):
        super().__init__()
        self.part = part(dim)
        self.norm = norm(context_dim)

    def forward(self, tokens: Tokens, context: Tokens, sights: Sights) -> Float[Tensor, "B T D"]:
        normed = context if sights.known else context.with_x(self.norm(context.x))
        return self.part(tokens, normed, sights)
