"""Scores that depend on how far apart two tokens are."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmformer.nn.kernels import dense, grouped
from mmformer.visibility import Sight


class RelativeBias(nn.Module):
    """Attention with a learned number for each head and distance in time added to its scores (T5, arXiv 1910.10683).

    It is a kernel: one that several layers are given is shared by them. Half of the buckets are for keys behind the
    query, half for those ahead; near distances have one each, far ones share in proportion to their logarithm, and all
    from `max_distance` on the last. Scores are not divided by the root of the channels, as T5's are not.

    Raises:
        ValueError: too few buckets, or a distance that they reach without sharing.
    """

    def __init__(self, num_heads: int, num_buckets: int = 32, max_distance: int = 128):
        super().__init__()
        if num_buckets < 4 or num_buckets % 2 or max_distance <= num_buckets // 4:
            raise ValueError(
                f"{num_buckets} buckets up to distance {max_distance}: give an even number, at least 4, and a "
                "distance of more than a quarter of it"
            )
        self.max_distance = max_distance
        self.table = nn.Embedding(num_buckets, num_heads)

    def forward(
        self, q: Float[Tensor, "B Tq H d"], k: Float[Tensor, "B Tk G d"], v: Float[Tensor, "B Tk G d"], sight: Sight
    ) -> Float[Tensor, "B Tq H d"]:
        kernel = grouped if sight.packed else dense
        return kernel(q * q.shape[-1] ** 0.5, k, v, sight, self.bias)

    def bias(self, query: Int[Tensor, "n Lq 3"], key: Int[Tensor, "n Lk 3"]) -> Float[Tensor, "n H Lq Lk"]:
        """What is added to the score of each query and key at these positions."""
        buckets = self.buckets(key[:, None, :, 0] - query[:, :, None, 0])
        return self.table(buckets).permute(0, 3, 1, 2)

    def buckets(self, distance: Int[Tensor, "*B"]) -> Int[Tensor, "*B"]:
        """The row of the table for a distance from the query to the key."""
        half = self.table.num_embeddings // 2
        near = half // 2
        far = distance.abs()
        share = torch.log(far.clamp(min=near).float() / near) / math.log(self.max_distance / near)
        shared = (near + (share * (half - near)).long()).clamp(max=half - 1)
        return torch.where(distance > 0, half, 0) + torch.where(far < near, far, shared)
