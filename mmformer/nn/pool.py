"""A learned query that looks over a sample's tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.nn.attention import CrossAttention
from mmformer.nn.block import FeedForward
from mmformer.tokens import Tokens, latent_tokens, merge
from mmformer.visibility import Sights


class AttentionPool(nn.Module):
    """One learned query attends to all tokens of a sample, and a feed-forward map follows (SigLIP's MAP head).

    Equation 6 of the Set Transformer (arXiv 1810.00825) with one seed and no residual around the attention.
    `norm` stands before the feed-forward map.
    """

    def __init__(
        self,
        dim: int,
        attention: Callable[[int], nn.Module] = lambda dim: CrossAttention(dim, max(1, dim // 64)),
        feedforward: Callable[[int], nn.Module] = FeedForward,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.attention, self.feedforward, self.norm = attention(dim), feedforward(dim), norm(dim)

    def forward(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        query = latent_tokens(self.query, tokens.num_samples, tokens.layout is not None)
        if tokens.layout is not None:
            tokens = merge([tokens], order=range(tokens.num_samples))
        x = self.attention(query, tokens, Sights(query, tokens)).reshape(tokens.num_samples, -1)
        return x + self.feedforward(self.norm(x))
