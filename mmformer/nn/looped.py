"""Layers that a stack goes through several times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from mmformer.tokens import Tokens
from mmformer.visibility import Sights


class Looped(nn.Module):
    """Layers in a row that are applied `times` times over with the same weights, in the place of one layer.

    The blocks of Perceiver IO (arXiv 2107.14795); `Transformer.repeat` repeats each layer by itself instead.
    """

    def __init__(self, dim: int, layers: Sequence[Callable[[int], nn.Module]], times: int):
        super().__init__()
        self.times = times
        self.layers = nn.ModuleList(layer(dim) for layer in layers)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights, cross_sights: Sights | None) -> Tokens:
        for _ in range(self.times):
            for layer in self.layers:
                tokens = layer(tokens, context, sights, cross_sights)
        return tokens
