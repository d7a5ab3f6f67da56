"""Attention whose softmax is replaced by a product of features, so that its cost is linear in the length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.nn.chunks import Chunks, carried, check_order, chunked, is_causal, on, planned
from mmformer.tokens import Tokens
from mmformer.visibility import Sights

INSTEAD = "its keys are summed before a query looks; take mmformer.nn.Attention with this rule"


class LinearAttention(nn.Module):
    """Attention with weights phi(q) phi(k), phi = elu + 1, in place of a softmax (arXiv 2006.16236, equation 7).

    Under a causal rule a token sees those that stand before it in its segment and itself (equation 9), also among
    tokens of one time; chunks of `chunk` tokens are computed at once. T x (chunk + channels of a head) products.

    Raises:
        ValueError: channels that do not divide by the heads; another rule; causal where time goes back; a memory.
    """

    def __init__(self, dim: int, num_heads: int, *, chunk: int = 64, bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels do not divide by {num_heads} heads")
        self.heads, self.chunk = num_heads, chunk
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights) -> Float[Tensor, "B T D"]:
        causal = is_causal(sights, "linear attention", INSTEAD)
        if causal:
            check_order(sights, "linear attention")
        chunks = planned(sights, chunked, self.chunk)
        qkv = self.qkv(tokens.x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).unbind(2)  # sums over all keys
        q, k, v = F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0)  # the last channel sums the weights
        q, k, v = (chunks.cut(x) for x in (q, k, v))
        sums = torch.einsum("nchd,nche->nhde", k, v)
        sums = carried(sums, chunks) if causal else _of_segment(sums, chunks)
        gathered = torch.einsum("nchd,nhde->nche", q, sums)
        if causal:
            weights = torch.einsum("nchd,nkhd->nhck", q, k).tril()
            gathered = gathered + torch.einsum("nhck,nkhe->nche", weights, v)
        out = gathered[..., :-1] / (gathered[..., -1:] + 1e-6)
        return self.out(chunks.join(out).flatten(2).to(tokens.x.dtype))


def _of_segment(sums: Float[Tensor, "n h d e"], chunks: Chunks) -> Float[Tensor, "n h d e"]:
    """For each chunk the sum over all those of its segment."""
    owner = on(chunks.first, sums.device)
    return torch.zeros_like(sums).index_add(0, owner, sums).index_select(0, owner)
