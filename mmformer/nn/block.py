"""A Transformer layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmformer.nn.experts import apply
from mmformer.tokens import Tokens, is_one_of
from mmformer.visibility import Sights

NormFactory = Callable[[int], nn.Module]


class FeedForward(nn.Module):
    """Two linear maps with a non-linearity between; `gated` multiplies by a third (GLU variants, arXiv 2002.05202).

    Between them are `hidden` channels, by default `expansion` times as many as `dim`. `inner_norm` stands in front of
    the last map (the sub-LN of Magneto, arXiv 2210.06423).
    """

    def __init__(
        self,
        dim: int,
        expansion: float = 4.0,
        *,
        hidden: int | None = None,
        activation: Callable[[], nn.Module] = nn.GELU,
        gated: bool = False,
        bias: bool = True,
        inner_norm: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        hidden = hidden or round(dim * expansion)
        self.gated = gated
        self.up = nn.Linear(dim, hidden * (1 + gated), bias=bias)
        self.activation = activation()
        self.inner_norm = inner_norm(hidden) if inner_norm else nn.Identity()
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        hidden = self.up(x)
        if self.gated:
            gate, value = hidden.chunk(2, -1)
            return self.down(self.inner_norm(self.activation(gate) * value))
        return self.down(self.inner_norm(self.activation(hidden)))


class Block(nn.Module):
    """Self-attention, cross-attention and a feed-forward map, each in a residual branch with its own norm.

    A part that is None is left out. Each part is a factory called with `dim`; `norm` is one for all branches, or one
    for each of "attention", "cross" and "feedforward". `post_norm` normalises after the residual sum (BERT) rather
    than before the branch. `cross_for` keeps cross-attention to the tokens of the named modalities (Q-Former's
    latents); the tokens of a sample without context skip it, norm and all, so that one stack of layers reads texts
    alone and beside pictures (BLIP).
    """

    def __init__(
        self,
        dim: int,
        *,
        attention: Callable[[int], nn.Module] | None = None,
        cross: Callable[[int], nn.Module] | None = None,
        feedforward: Callable[[int], nn.Module] | None = FeedForward,
        norm: NormFactory | Mapping[str, NormFactory] = nn.LayerNorm,
        post_norm: bool = False,
        dropout: float = 0.0,
        cross_for: Sequence[str] | None = None,
    ):
        super().__init__()
        norms = norm if isinstance(norm, Mapping) else dict.fromkeys(("attention", "cross", "feedforward"), norm)
        self.post_norm = post_norm
        self.cross_for = None if cross_for is None else list(cross_for)
        self.attention = attention(dim) if attention else None
        self.attention_norm = norms["attention"](dim) if attention else None
        self.cross = cross(dim) if cross else None
        self.cross_norm = norms["cross"](dim) if cross else None
        self.feedforward = feedforward(dim) if feedforward else None
        self.feedforward_norm = norms["feedforward"](dim) if feedforward else None
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights, cross_sights: Sights | None) -> Tokens:
        if self.attention is not None and self.attention_norm is not None:
            attention = self.attention
            tokens = self._residual(tokens, self.attention_norm, lambda t: attention(t, None, sights))
        if self.cross is not None and self.cross_norm is not None:
            tokens = self._cross(tokens, context, cross_sights)
        if self.feedforward is not None and self.feedforward_norm is not None:
            feedforward = self.feedforward
            tokens = self._residual(tokens, self.feedforward_norm, lambda t: apply(feedforward, t))
        return tokens

    def _residual(self, tokens: Tokens, norm: nn.Module, branch: Callable[[Tokens], Tensor]) -> Tokens:
        if self.post_norm:
            return tokens.with_x(apply(norm, tokens.with_x(tokens.x + self._drop(branch(tokens)))))
        return tokens.with_x(tokens.x + self._drop(branch(tokens.with_x(apply(norm, tokens)))))

    def _drop(self, x: Tensor) -> Tensor:
        return x if self.dropout is None else self.dropout(x)

    def _cross(self, tokens: Tokens, context: Tokens | None, sights: Sights | None) -> Tokens:
        if context is None or sights is None:
            raise ValueError("a layer with cross-attention needs a context: name its modalities in fusion.context")
        cross, norm = self.cross, self.cross_norm
        assert cross is not None
        assert norm is not None
        if not context.x.shape[1]:
            return tokens
        out = self._residual(tokens, norm, lambda t: cross(t, context, sights))
        skips = self._skips(tokens, sights)
        return out if skips is None else tokens.with_x(torch.where(skips[..., None], tokens.x, out.x))

    def _skips(self, tokens: Tokens, sights: Sights) -> Bool[Tensor, "B T"] | None:
        """Which tokens have no part in cross-attention; None where all have."""
        if self.cross_for is None:
            return sights.keyless
        others = ~is_one_of(tokens, self.cross_for)
        return others if sights.keyless is None else others | sights.keyless
