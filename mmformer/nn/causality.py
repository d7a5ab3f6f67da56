"""Layers with weights of their own for when they are causal."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mmformer.tokens import Tokens
from mmformer.visibility import Sights


class ByCausality(nn.Module):
    """Two layers: `full` where tokens see all others, `causal` where they see only what came before.

    So one stack is encoder and decoder, as the rule says that the fusion runs under, and shares all but these. In BLIP
    (arXiv 2201.12086, section 3.1) they are a `Block` of self-attention alone, its norm with it, in front of one of
    cross-attention and the feed-forward map.
    """

    def __init__(self, dim: int, layer: Callable[[int], nn.Module]):
        super().__init__()
        self.full, self.causal = layer(dim), layer(dim)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights, cross_sights: Sights | None) -> Tokens:
        chosen = self.causal if sights.visibility.causal else self.full
        return chosen(tokens, context, sights, cross_sights)
