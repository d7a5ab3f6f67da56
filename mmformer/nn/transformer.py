"""A stack of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from mmformer.nn.experts import apply
from mmformer.nn.memory import Memory
from mmformer.nn.recompute import Recompute
from mmformer.tokens import Tokens
from mmformer.visibility import Sights, Visibility


class Transformer(nn.Module):
    """`depth` layers made from a repeating pattern of layer factories, then a norm.

    Layer i is made by `layers[i % len(layers)]`, each called with `dim`. `repeat` applies every layer that often in a
    row with the same weights (ALBERT, arXiv 1909.11942, is depth 1 repeated), so the depth that is computed is depth x
    repeat. `visibility` rules over all layers; a layer's own comes on top. In front of the first layer `position` adds
    a vector for where a token stands in the joint sequence (OPT behind BLIP-2's queries), and `entry_norm` normalises
    (BERT, CLIP's pictures).

    Raises:
        ValueError: no layer factory for a depth above 0.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        layers: Sequence[Callable[[int], nn.Module]],
        *,
        repeat: int = 1,
        visibility: Visibility | None = None,
        norm: Callable[[int], nn.Module] | None = nn.LayerNorm,
        entry_norm: Callable[[int], nn.Module] | None = None,
        position: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        if depth and not layers:
            raise ValueError(f"depth {depth} but no layers: give at least one layer factory")
        self.repeat = repeat
        self.visibility = visibility or Visibility()
        self.position = position(dim) if position else None
        self.entry_norm = entry_norm(dim) if entry_norm else nn.Identity()
        self.layers = nn.ModuleList(layers[i % len(layers)](dim) for i in range(depth))
        self.norm = norm(dim) if norm else nn.Identity()
        self.recompute: Recompute | None = None
        """Of a training run: what of the layers is computed again rather than kept for the gradient."""

    def forward(
        self,
        tokens: Tokens,
        context: Tokens | None = None,
        visibility: Visibility | None = None,
        memory: Memory | None = None,
    ) -> Tokens:
        """Mix the tokens among themselves and with a context; `visibility` adds to the Transformer's own rule.

        With a `memory` they also see the tokens of earlier passes, and the context is that of the first.
        """
        rule = self.visibility if visibility is None else self.visibility & visibility
        if self.position is not None:
            tokens = tokens.with_x(tokens.x + self.position(tokens.position))
        tokens = tokens.with_x(self.entry_norm(tokens.x))
        if memory is None or not self.layers:  # without layers no token sees another, whatever the rule
            sights = Sights(tokens, tokens, rule)
            cross_sights = None if context is None else Sights(tokens, context)
        else:
            sights, cross_sights = memory.of(self).sights(tokens, context, rule)
            context = None if cross_sights is None else cross_sights.key
        again = self.recompute if self.training else None
        for number, layer in enumerate(layer for layer in self.layers for _ in range(self.repeat)):
            inputs = tokens, context, sights, cross_sights
            tokens = layer(*inputs) if again is None else again(number, layer, *inputs)
        return tokens.with_x(apply(self.norm, tokens))
