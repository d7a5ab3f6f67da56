"""Attention to a few blocks of keys that each query chooses (mixture of block attention, arXiv 2502.13189)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmformer.nn.sparse import row_owners, where
from mmformer.nn.tiles import HIDDEN, Tile, attend_tiles_with_lse
from mmformer.visibility import Sight

CHOOSING = 1024
"""Queries that choose at a time."""


@dataclass(frozen=True)
class Routed:
    """A kernel: every head of a query sees its own block of `size` tokens, and of the others those `top` - 1 whose mean
    key it scores highest; of a context the `top` best.

    Blocks are of one segment. Under a causal rule a query chooses among blocks that lie wholly in its past, so that no
    later key has a say; what it chooses it sees as the rule allows. As in the paper the choice has no gradient. Scores
    cost tokens x top x size, the choice tokens x blocks.

    Raises:
        ValueError: blocks of no token, or no block to see.
    """

    size: int
    top: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.top < 1:
            raise ValueError(f"{self.top} blocks of {self.size} tokens: give at least 1 of each")

    def __call__(
        self,
        q: Float[Tensor, "B Tq H d"],
        k: Float[Tensor, "B Tk G d"],
        v: Float[Tensor, "B Tk G e"],
        sight: Sight,
    ) -> Float[Tensor, "B Tq H e"]:
        shape = q.shape[:2]
        if torch.is_autocast_enabled(q.device.type):
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = (t.to(dtype) for t in (q, k, v))
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        plan = sight.kept(_plan, self.size)
        parts = []
        if plan.own is not None:
            out, lse = attend_tiles_with_lse(q, k, v, plan.own)
            parts.append((out[:, :, None], lse[:, :, None]))
        others = self.top - len(parts)
        if others and plan.blocks:
            parts.append(_routed(q, k, v, plan, choose(q.detach(), k.detach(), plan, others)))
        if not parts:
            return q.new_zeros(*shape, q.shape[1], v.shape[2])
        return _joined(*(torch.cat(part, 2) for part in zip(*parts, strict=True))).unflatten(0, shape)


@dataclass(frozen=True)
class Plan:
    """The keys in blocks, in the order of their segments, and what a choice must heed.

    `own` are the tiles in which each block sees itself, where queries are keys; `open` says that whatever may be chosen
    is visible whole.
    """

    sight: Sight
    blocks: tuple[slice | Tensor, ...]
    owner: Int[np.ndarray, " n"]
    latest: Int[Tensor, " n"]
    block_of_key: Int[Tensor, " Tk"]
    query_owner: Int[Tensor, " Tq"]
    own: tuple[Tile, ...] | None
    open: bool


def _plan(sight: Sight, size: int) -> Plan:
    mine, theirs = (owner.flatten() for owner in row_owners(sight))
    device, owners = theirs.device, theirs.cpu().numpy()
    order = np.argsort(owners, kind="stable")
    order = order[owners[order] >= 0]
    starts = np.flatnonzero(np.diff(owners[order], prepend=-1))
    ends = np.append(starts, len(order))[1:]
    spans = [order[i : min(i + size, b)] for a, b in zip(starts, ends, strict=True) for i in range(a, b, size)]
    number = np.full(len(owners), -1, dtype=np.int64)
    for i, span in enumerate(spans):
        number[span] = i
    block_of_key = torch.from_numpy(number).to(device)
    time = sight.key.position[..., 0].flatten()
    latest = time.new_full((len(spans) + 1,), -1).scatter_reduce(0, block_of_key + 1, time, "amax")[1:]
    rule, blocks = sight.visibility, tuple(_on(where(span), device) for span in spans)
    own = None
    if sight.query is sight.key:
        seen = (None if rule.full else _allowed(sight, span, span) for span in blocks)
        own = tuple(tile for span, mask in zip(blocks, seen, strict=True) for tile in _tile(span, span, mask))
    first = [span[0] for span in spans]
    return Plan(
        sight=sight,
        blocks=blocks,
        owner=owners[np.asarray(first, dtype=np.int64)],
        latest=latest,
        block_of_key=block_of_key,
        query_owner=mine,
        own=own,
        open=not (rule.rules or rule.sees or rule.current),
    )


def _on(index: slice | Tensor, device: torch.device) -> slice | Tensor:
    return index if isinstance(index, slice) else index.to(device)


def _tile(query: slice | Tensor, key: slice | Tensor, seen: Bool[Tensor, "b s"] | None) -> Iterator[Tile]:
    """The tile of some queries and keys, without queries that see nothing; None says that all see all."""
    if seen is None or seen.all():
        yield Tile(query, key)
        return
    rows = seen.any(1)
    if rows.all():
        yield Tile(query, key, ~seen)
    elif rows.any():
        index = torch.arange(query.start, query.stop, device=rows.device) if isinstance(query, slice) else query
        yield Tile(index[rows], key, ~seen[rows])


def _allowed(sight: Sight, query: slice | Tensor, key: slice | Tensor) -> Bool[Tensor, "b s"]:
    mine, theirs = sight.query, sight.key
    return sight.visibility.allows(
        mine.modality.flatten()[query][:, None],
        mine.position.flatten(0, 1)[query][:, None],
        theirs.modality.flatten()[key],
        theirs.position.flatten(0, 1)[key],
        None if sight.last is None else sight.last.flatten()[query][:, None],
    )


@torch.no_grad()
def choose(q: Float[Tensor, "Tq H d"], k: Float[Tensor, "Tk G d"], plan: Plan, count: int) -> Int[Tensor, "Tq H _"]:
    """The blocks that each head of a query scores highest besides its own; -1 where there are not so many."""
    means = _means(k, plan)
    chosen = torch.full((*q.shape[:2], count), -1, device=q.device)
    causal, is_self = plan.sight.visibility.causal, plan.own is not None
    time = plan.sight.query.position[..., 0].flatten()
    owners = torch.from_numpy(plan.owner).to(q.device)
    for start in range(0, len(q), CHOOSING):
        part = slice(start, start + CHOOSING)
        mine = plan.query_owner[part]
        low = int(np.searchsorted(plan.owner, int(mine.masked_fill(mine < 0, 2**62).min())))
        high = int(np.searchsorted(plan.owner, int(mine.max()), side="right"))
        if high <= low:
            continue
        may = (mine[:, None] == owners[low:high]) & (mine >= 0)[:, None]
        if causal:
            may &= plan.latest[low:high] <= time[part, None]
        if is_self:
            may &= plan.block_of_key[part, None] != torch.arange(low, high, device=q.device)
        query = q[part].float().unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("tgrd,ngd->tgrn", query, means[low:high]).flatten(1, 2)
        scores = scores.masked_fill(~may[:, None], -torch.inf)
        best = scores.topk(min(count, high - low), -1)
        chosen[part, :, : best.indices.shape[2]] = torch.where(best.values > -torch.inf, best.indices + low, -1)
    return chosen


def _means(k: Float[Tensor, "Tk G d"], plan: Plan) -> Float[Tensor, "n G d"]:
    """The mean key of each block."""
    where_to = plan.block_of_key + 1  # padding goes to a row of its own
    total = torch.zeros(len(plan.blocks) + 1, *k.shape[1:], device=k.device).index_add_(0, where_to, k.float())
    count = where_to.bincount(minlength=len(total)).clamp(min=1)
    return (total / count[:, None, None])[1:]


def _routed(
    q: Float[Tensor, "Tq H d"],
    k: Float[Tensor, "Tk G d"],
    v: Float[Tensor, "Tk G e"],
    plan: Plan,
    chosen: Int[Tensor, "Tq H c"],
) -> tuple[Float[Tensor, "Tq H c e"], Float[Tensor, "Tq H c"]]:
    """What each query gathers from each block that it chose, and the logarithm of its weight there.

    Choices are sorted by head and block, so that all queries of a head that chose a block are one tile.
    """
    heads, count = q.shape[1], len(plan.blocks)
    head = torch.arange(heads, device=q.device)[None, :, None]
    group = torch.where(chosen < 0, heads * count, head * count + chosen).flatten()
    order = group.argsort(stable=True)
    sizes = group.bincount(minlength=heads * count + 1).tolist()
    order = order[: len(order) - sizes.pop()]
    row = order // chosen.shape[2]
    tiles = tuple(_choosers(plan, sizes, row // heads, heads // k.shape[1], len(k)))
    keys, values = (t.transpose(0, 1).flatten(0, 1)[:, None] for t in (k, v))
    out, lse = attend_tiles_with_lse(q.flatten(0, 1)[row][:, None], keys, values, tiles)
    outs = out.new_zeros(chosen.numel(), v.shape[2]).index_copy(0, order, out[:, 0])
    weights = lse.new_full((chosen.numel(),), -torch.inf).index_copy(0, order, lse[:, 0])
    return outs.view(*chosen.shape, -1), weights.view(chosen.shape)


def _choosers(plan: Plan, sizes: list[int], token: Tensor, repeats: int, width: int) -> Iterator[Tile]:
    """For each head and block the tile of the choices that fell on it; keys lie head by head."""
    start, count = 0, len(plan.blocks)
    for i, size in enumerate(sizes):
        query, start = slice(start, start + size), start + size
        if not size:
            continue
        key, offset = plan.blocks[i % count], i // count // repeats * width
        moved = slice(key.start + offset, key.stop + offset) if isinstance(key, slice) else key + offset
        seen = None if plan.open else _allowed(plan.sight, token[query], key)
        yield from _tile(query, moved, seen)


def _joined(outs: Float[Tensor, "T H c e"], lse: Float[Tensor, "T H c"]) -> Float[Tensor, "T H e"]:
    """Attention over several parts from that over each; zeros where all are empty."""
    weights = (lse - lse.detach().amax(-1, keepdim=True).clamp(min=HIDDEN)).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return (weights[..., None, :].to(outs.dtype) @ outs)[..., 0, :]
