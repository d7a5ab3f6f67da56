"""Attention over token sequences."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from mmformer.nn.kernels import Kernel, attend
from mmformer.nn.position import Rotary
from mmformer.tokens import Tokens
from mmformer.visibility import Sights, Visibility


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762) of tokens over themselves, or over a context of `context_dim` channels.

    Fewer `num_kv_heads` than heads share keys and values between heads (grouped queries, arXiv 2305.13245).
    `visibility` is this layer's own rule, on top of the one the whole Transformer runs under.

    Raises:
        ValueError: channels that do not divide by the heads, or heads by the key-value heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        rotary: Callable[[int], Rotary] | None = None,
        visibility: Visibility | None = None,
        kernel: Kernel = attend,
    ):
        super().__init__()
        groups = num_kv_heads or num_heads
        if dim % num_heads or num_heads % groups:
            raise ValueError(
                f"{dim} channels, {num_heads} heads, {groups} key-value heads: each must divide the one before"
            )
        self.heads, self.groups, self.head_dim = num_heads, groups, dim // num_heads
        self.visibility, self.kernel = visibility, kernel
        shared = 2 * groups * self.head_dim
        self.rotary = rotary(self.head_dim) if rotary else None
        self.crosses = context_dim is not None
        if context_dim is None:
            self.qkv = nn.Linear(dim, dim + shared, bias=bias)
        else:
            self.query = nn.Linear(dim, dim, bias=bias)
            self.key_value = nn.Linear(context_dim, shared, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights) -> Float[Tensor, "B T D"]:
        q, k, v = self._project(tokens, context)
        if self.rotary is not None:
            q = self.rotary(q, tokens.position)
            k = self.rotary(k, (context or tokens).position)
        gathered = self.kernel(q, k, v, sights.under(self.visibility))
        return self.out(gathered.flatten(2))

    def _project(self, tokens: Tokens, context: Tokens | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, d), keys and values (B, T, G, d)."""
        if self.crosses:
            if context is None:
                raise ValueError("cross-attention needs a context: name its modalities in fusion.context")
            q = self.query(tokens.x).unflatten(-1, (self.heads, self.head_dim))
            k, v = self.key_value(context.x).unflatten(-1, (2 * self.groups, self.head_dim)).chunk(2, 2)
            return q, k, v
        joint = self.qkv(tokens.x).unflatten(-1, (self.heads + 2 * self.groups, self.head_dim))
        q, k, v = joint.split((self.heads, self.groups, self.groups), 2)
        return q, k, v


def cross_attention(dim: int, num_heads: int, *, context_dim: int | None = None, **options) -> Attention:
    """Attention over a context whose channels default to the tokens' own; options as in `Attention`."""
    return Attention(dim, num_heads, context_dim=context_dim or dim, **options)
