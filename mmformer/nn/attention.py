"""Attention over token sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from mmformer.nn.kernels import Kernel, attend
from mmformer.tokens import Tokens
from mmformer.visibility import Sights, Visibility


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762) of tokens over themselves.

    Fewer `num_kv_heads` than heads share keys and values between heads (grouped queries, arXiv 2305.13245).
    `head_dim` is dim / num_heads where it is not given: one number, or that of queries and keys and that of values.
    `bias` is that of both maps, or of the joint one of queries, keys and values and of the last one each. `rotary`
    puts places into queries and keys: `Rotary`, `NormedRotary`. `visibility` is this layer's own rule, on top of the
    one the whole Transformer runs under.

    Raises:
        ValueError: channels that do not divide by the heads, or heads by the key-value heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | Sequence[int] | None = None,
        bias: bool | Sequence[bool] = True,
        rotary: Callable[[int], nn.Module] | None = None,
        visibility: Visibility | None = None,
        kernel: Kernel = attend,
    ):
        super().__init__()
        self.heads, self.groups = num_heads, num_kv_heads or num_heads
        self.head_dim, self.value_dim = _head_dims(dim, self.heads, self.groups, head_dim)
        self.visibility, self.kernel = visibility, kernel
        self.rotary = rotary(self.head_dim) if rotary else None
        joint_bias, out_bias = (bias, bias) if isinstance(bias, bool) else bias
        width = (self.heads + self.groups) * self.head_dim + self.groups * self.value_dim
        self.qkv = nn.Linear(dim, width, bias=joint_bias)
        self.out = nn.Linear(self.heads * self.value_dim, dim, bias=out_bias)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights) -> Float[Tensor, "B T D"]:
        keys, values = (self.groups, self.head_dim), (self.groups, self.value_dim)
        q, k, v = _cut(self.qkv(tokens.x), (self.heads, self.head_dim), keys, values)
        if self.rotary is not None:
            q, k = self.rotary(q, k, tokens.position)
        k, v = sights.joined(k, v)
        gathered = self.kernel(q, k, v, sights.under(self.visibility))
        return self.out(gathered.flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens over a context of `context_dim` channels (the tokens' own where not given).

    Options as in `Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | Sequence[int] | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        visibility: Visibility | None = None,
        kernel: Kernel = attend,
    ):
        super().__init__()
        self.heads, self.groups = num_heads, num_kv_heads or num_heads
        self.head_dim, self.value_dim = _head_dims(dim, self.heads, self.groups, head_dim)
        self.visibility, self.kernel = visibility, kernel
        self.query = nn.Linear(dim, self.heads * self.head_dim, bias=bias)
        self.key_value = nn.Linear(context_dim or dim, self.groups * (self.head_dim + self.value_dim), bias=bias)
        self.out = nn.Linear(self.heads * self.value_dim, dim, bias=bias)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights) -> Float[Tensor, "B T D"]:
        if context is None:
            raise ValueError("cross-attention needs a context: name its modalities in fusion.context")
        q = self.query(tokens.x).unflatten(-1, (self.heads, self.head_dim))
        k, v = sights.given(lambda: self._keys_and_values(context.x))
        gathered = self.kernel(q, k, v, sights.under(self.visibility))
        return self.out(gathered.flatten(2))

    def _keys_and_values(self, x: Float[Tensor, "B T C"]) -> list[Float[Tensor, "B T _ _"]]:
        return _cut(self.key_value(x), (self.groups, self.head_dim), (self.groups, self.value_dim))


def _head_dims(dim: int, heads: int, groups: int, given: int | Sequence[int] | None) -> tuple[int, int]:
    """The channels of a head: of queries and keys, and of values."""
    if heads % groups or (given is None and dim % heads):
        raise ValueError(f"{dim} channels, {heads} heads, {groups} key-value heads: each must divide the one before")
    if isinstance(given, Sequence):
        return given[0], given[1]
    size = given or dim // heads
    return size, size


def _cut(x: Float[Tensor, "B T C"], *shapes: tuple[int, int]) -> list[Float[Tensor, "B T _ _"]]:
    """Channels as several times (heads, channels of a head)."""
    parts = x.split([heads * size for heads, size in shapes], -1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]
