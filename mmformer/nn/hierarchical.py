"""Attention to near tokens one by one, and to far ones in summaries that get coarser with the distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mmformer.nn.chunks import Chunks, chunked, is_causal, on, planned, smallest_step
from mmformer.tokens import Tokens
from mmformer.visibility import Sights

INSTEAD = "summaries stand for stretches of a sequence; take mmformer.nn.Attention with this rule"


class HierarchicalAttention(nn.Module):
    """Attention to the near tokens, and to means over the far ones (after H-Transformer-1D, arXiv 2107.11906).

    A segment is cut into blocks of `block` tokens. A query sees the keys of its own block and of the two beside it. All
    else it sees in summaries: blocks join in pairs, level by level, and at each level what lies in the neighbourhood of
    its block there, and was not seen on a finer level, is `summaries` means for each block below. So every key is seen
    once, alone or in one summary, which stands for more tokens the farther they are. A summary of n tokens has the mean
    of their keys (rotated, with `rotary`) and of their values, and log n added to its score: it is exact where the
    keys are equal.

    T x (3 block + 3 summaries log2(T / block)) scores. In a causal rule a summary is seen when none of its tokens is
    later than the query. Unlike in the paper, queries are never averaged.

    Raises:
        ValueError: channels that do not divide by the heads, or a block by its summaries; another rule; a memory.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        block: int,
        summaries: int,
        *,
        rotary: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels do not divide by {num_heads} heads")
        if block % summaries:
            raise ValueError(f"blocks of {block} tokens do not divide into {summaries} summaries")
        self.heads, self.block, self.summaries = num_heads, block, summaries
        self.rotary = rotary(dim // num_heads) if rotary else None
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights) -> Float[Tensor, "B T D"]:
        causal = is_causal(sights, "hierarchical attention", INSTEAD)
        plan = planned(sights, make_hierarchy, self.block, self.summaries, causal)
        q, k, v = self.qkv(tokens.x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.rotary is not None:
            q, k = self.rotary(q, k, tokens.position)
        q, k, v = (plan.chunks.cut(x) for x in (q, k, v))
        keys, values = (plan.keys(x).transpose(1, 2) for x in (k, v))
        mask = plan.mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min / 4)[:, None]
        gathered = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask)
        return self.out(plan.chunks.join(gathered.transpose(1, 2)).flatten(2))


@dataclass(frozen=True, eq=False)
class Level:
    """One level of summaries: of which rows of the level below its own are made, and which rows a chunk looks at.

    Row r joins rows `below[r]` (none on the first level, which is made of chunks), the second of which may be missing.
    """

    below: Int[Tensor, "r 2"] | None
    has_second: Bool[Tensor, " r"] | None
    looked_at: Int[Tensor, "n k"]
    exists: Bool[Tensor, "n k"]

    def joined(self, finer: Shaped[Tensor, "m t ..."], missing: int) -> Shaped[Tensor, "r u ..."]:
        """The rows of which each of its own is made, with what is missing filled."""
        if self.below is None or self.has_second is None:
            return finer
        first, second = (finer.index_select(0, rows) for rows in self.below.unbind(1))
        return torch.cat([first, second.masked_fill(~self.has_second.view(-1, *[1] * (finer.ndim - 1)), missing)], 1)


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Chunks, those near each, the levels of summaries, and what is added to the scores of all of these keys."""

    chunks: Chunks
    near: Int[Tensor, "n j"]
    levels: Sequence[Level]
    sizes: Sequence[Int[Tensor, "_ s"]]
    summaries: int
    mask: Float[Tensor, "n _ K"]

    def keys(self, cells: Shaped[Tensor, "n c h d"]) -> Shaped[Tensor, "n K h d"]:
        """What the queries of each chunk look at: tokens near them, then summaries level by level."""
        out = [cells[self.near].flatten(1, 2)]
        for level, size in zip(self.levels, self.sizes, strict=True):
            cells = level.joined(cells, 0).unflatten(1, (self.summaries, -1)).sum(2)
            mean = cells / size.clamp(min=1)[..., None, None].to(cells.dtype)
            out.append(mean[level.looked_at].flatten(1, 2))
        return torch.cat(out, 1)


def make_hierarchy(tokens: Tokens, block: int, summaries: int, causal: bool) -> Hierarchy:
    """Who looks at what; nothing ahead where time orders the tokens."""
    ahead = not causal or smallest_step(tokens) < 1
    chunks = chunked(tokens, block)
    alone = chunks.size < block  # one chunk for each segment
    near, exists = chunks.beside([0] if alone else [-1, 0, 1] if ahead else [-1, 0])
    levels = [] if alone else _levels(chunks, ahead)
    time = chunks.cut(tokens.position[..., 0])
    earliest = torch.iinfo(time.dtype).min
    size, latest = chunks.real.long(), torch.where(chunks.real, time, earliest)
    seen, late, sizes = [size[near] * exists[..., None]], [latest[near]], []
    for level in levels:
        size = level.joined(size, 0).unflatten(1, (summaries, -1)).sum(2)
        latest = level.joined(latest, earliest).unflatten(1, (summaries, -1)).amax(2)
        sizes.append(size)
        seen.append(size[level.looked_at] * level.exists[..., None])
        late.append(latest[level.looked_at])
    count = torch.cat([part.flatten(1) for part in seen], 1)[:, None]
    if causal:
        count = torch.where(torch.cat([part.flatten(1) for part in late], 1)[:, None] <= time[..., None], count, 0)
    # What is not seen has no -inf: a cell left over sees nothing, and its softmax would have no value.
    mask = torch.where(count > 0, count.clamp(min=1).float().log(), torch.finfo(torch.float32).min)
    return Hierarchy(chunks, near, levels, sizes, summaries, mask)


def _levels(chunks: Chunks, ahead: bool) -> list[Level]:
    """Levels until the neighbourhood of every block is its whole segment; nothing `ahead` is looked at if not so."""
    counts, device = chunks.counts, chunks.index.device
    owner = np.repeat(np.arange(len(counts)), counts)
    levels, below, has_second = [], None, None
    while counts.max(initial=0) >= 3:
        block, first = chunks.number >> len(levels), counts.cumsum() - counts
        steps = [np.full_like(block, -2), np.where(block % 2, -3, 3)] + [np.full_like(block, 2)] * ahead
        place = block[:, None] + np.stack(steps, 1)
        exists = (place >= 0) & (place < (counts[owner] if ahead else block)[:, None])
        looked_at = np.where(exists, first[owner][:, None] + place, 0)
        levels.append(Level(below, has_second, on(looked_at, device), on(exists, device)))
        joined = -(-counts // 2)
        segment = np.repeat(np.arange(len(counts)), joined)
        number = np.arange(joined.sum()) - np.repeat(joined.cumsum() - joined, joined)
        pair = 2 * number + 1 < counts[segment]
        left = first[segment] + 2 * number
        below, has_second = on(np.stack([left, left + pair], -1), device), on(pair, device)
        counts = joined
    return levels
