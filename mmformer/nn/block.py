"""A Transformer layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.tokens import Tokens, modality_id
from mmformer.visibility import Sights


class FeedForward(nn.Module):
    """Two linear maps with a non-linearity between; `gated` multiplies by a third (GLU variants, arXiv 2002.05202)."""

    def __init__(
        self,
        dim: int,
        expansion: float = 4.0,
        *,
        activation: Callable[[], nn.Module] = nn.GELU,
        gated: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        hidden = round(dim * expansion)
        self.gated = gated
        self.up = nn.Linear(dim, hidden * (1 + gated), bias=bias)
        self.activation = activation()
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, tokens: Tokens) -> Float[Tensor, "B T D"]:
        hidden = self.up(tokens.x)
        if self.gated:
            gate, value = hidden.chunk(2, -1)
            return self.down(self.activation(gate) * value)
        return self.down(self.activation(hidden))


class Block(nn.Module):
    """Self-attention, cross-attention and a feed-forward map, each in a residual branch with its own norm.

    A part that is None is left out. Each part is a factory called with `dim`. `post_norm` normalises after the
    residual sum (BERT) rather than before the branch. `cross_for` keeps cross-attention to the tokens of the named
    modalities (Q-Former's latents).
    """

    def __init__(
        self,
        dim: int,
        *,
        attention: Callable[[int], nn.Module] | None = None,
        cross: Callable[[int], nn.Module] | None = None,
        feedforward: Callable[[int], nn.Module] | None = FeedForward,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        post_norm: bool = False,
        dropout: float = 0.0,
        cross_for: Sequence[str] | None = None,
    ):
        super().__init__()
        self.post_norm = post_norm
        self.cross_for = None if cross_for is None else [modality_id(name) for name in cross_for]
        self.attention = attention(dim) if attention else None
        self.attention_norm = norm(dim) if attention else None
        self.cross = cross(dim) if cross else None
        self.cross_norm = norm(dim) if cross else None
        self.feedforward = feedforward(dim) if feedforward else None
        self.feedforward_norm = norm(dim) if feedforward else None
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights, cross_sights: Sights | None) -> Tokens:
        if self.attention is not None and self.attention_norm is not None:
            attention = self.attention
            tokens = self._residual(tokens, self.attention_norm, lambda t: attention(t, None, sights))
        if self.cross is not None and self.cross_norm is not None:
            if context is None or cross_sights is None:
                raise ValueError("a layer with cross-attention needs a context: name its modalities in fusion.context")
            tokens = self._residual(tokens, self.cross_norm, lambda t: self._cross(t, context, cross_sights))
        if self.feedforward is not None and self.feedforward_norm is not None:
            tokens = self._residual(tokens, self.feedforward_norm, self.feedforward)
        return tokens

    def _residual(self, tokens: Tokens, norm: nn.Module, branch: Callable[[Tokens], Tensor]) -> Tokens:
        if self.post_norm:
            return tokens.with_x(norm(tokens.x + self._drop(branch(tokens))))
        return tokens.with_x(tokens.x + self._drop(branch(tokens.with_x(norm(tokens.x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return x if self.dropout is None else self.dropout(x)

    def _cross(self, tokens: Tokens, context: Tokens, sights: Sights) -> Float[Tensor, "B T D"]:
        assert self.cross is not None
        gathered = self.cross(tokens, context, sights)
        if self.cross_for is None:
            return gathered
        chosen = torch.zeros_like(tokens.modality, dtype=torch.bool)
        for number in self.cross_for:
            chosen = chosen | (tokens.modality == number)
        return torch.where(chosen[..., None], gathered, 0)
