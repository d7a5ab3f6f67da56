"""Attention in tiles: some queries over the keys that they look at, one dense product at a time.

A pattern of who sees whom is a list of tiles, made once a step on the host; how it is computed is the same for all.
Nothing is kept for the backward but queries, keys and values: a tile's weights are computed again, so that the memory
beyond inputs and gradients is that of one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

HIDDEN = -1e30
"""What is added to the score of a hidden key: below any score, and finite, so that the softmax of a tile is too."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries of a row and the keys that they look at, by index or, where these adjoin, as a span.

    `hidden` is true where a query does not see a key; every query of a tile sees one at least.
    """

    query: slice | Int[Tensor, " b"]
    key: slice | Int[Tensor, " s"]
    hidden: Bool[Tensor, "b s"] | None = None

    @property
    def entries(self) -> int:
        """How many scores are computed for a head."""
        return _size(self.query) * _size(self.key)


def attend_tiles(
    q: Float[Tensor, "Tq H d"], k: Float[Tensor, "Tk G d"], v: Float[Tensor, "Tk G e"], tiles: Sequence[Tile]
) -> Float[Tensor, "Tq H e"]:
    """Attention of each query over the keys of its tile, of which it has one at most; zeros where it has none."""
    return attend_tiles_with_lse(q, k, v, tiles, want_lse=False)[0]


def attend_tiles_with_lse(
    q: Float[Tensor, "Tq H d"],
    k: Float[Tensor, "Tk G d"],
    v: Float[Tensor, "Tk G e"],
    tiles: Sequence[Tile],
    want_lse: bool = True,
) -> tuple[Float[Tensor, "Tq H e"], Float[Tensor, "_ _"]]:
    """The same, and the logarithm of the sum of a query's weights before they are normalised, by which to join parts.

    Without `want_lse` the second is empty. In a tile's place a query has minus infinity where it is in none.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t.to(dtype) for t in (q, k, v))
    return _Tiles.apply(q, k, v, tuple(tiles), want_lse)  # pyright: ignore[reportReturnType]


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], want_lse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v)
        ctx.tiles, ctx.want_lse = tiles, want_lse
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        lse = torch.full(q.shape[:2] if want_lse else (0, 0), -torch.inf, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            for tile in tiles:
                query = _by_group(q, tile.query, k.shape[1], q.shape[2] ** -0.5)
                scores = _scores(query, _by_head(k, tile.key), tile.hidden)
                weights = torch.softmax(scores, -1, dtype=torch.float32 if want_lse else None)
                if want_lse:  # the largest score and weight tell it, without another exponential
                    total = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
                    _put(lse[..., None], tile.query, _by_token(total, q.shape[1]))
                values = torch.bmm(weights.to(v.dtype), _take(v, tile.key).transpose(0, 1))
                _put(out, tile.query, _by_token(values, q.shape[1]))
        ctx.mark_non_differentiable(*([] if want_lse else [lse]))
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v = ctx.saved_tensors
        out, lse = gradients
        groups, scale = k.shape[1], q.shape[2] ** -0.5
        dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
        # keys and values gather from several tiles: the sum is kept in 32 bits
        dk, dv = (torch.zeros(x.shape, device=x.device) for x in (k, v))
        for tile in ctx.tiles:
            query, key = _by_group(q, tile.query, groups, scale), _by_head(k, tile.key)
            value, given = _by_head(v, tile.key), _by_group(out, tile.query, groups)
            weights = torch.softmax(_scores(query, key, tile.hidden), -1)
            _accumulate(dv, tile.key, weights, given)
            slope = torch.bmm(given, value.transpose(1, 2))
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, slope.dtype)
            if ctx.want_lse:
                slope.addcmul_(weights, _by_group(lse[..., None], tile.query, groups).to(weights.dtype))
            _put(dq, tile.query, _by_token(torch.bmm(slope, key), q.shape[1]).mul_(scale))
            _accumulate(dk, tile.key, slope, query)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _size(where: slice | Tensor) -> int:
    return where.stop - where.start if isinstance(where, slice) else len(where)


def _take(x: Shaped[Tensor, "T ..."], where: slice | Tensor) -> Shaped[Tensor, "n ..."]:
    return x[where] if isinstance(where, slice) else x.index_select(0, where)


def _put(x: Shaped[Tensor, "T H e"], where: slice | Tensor, values: Shaped[Tensor, "n H e"]) -> None:
    if isinstance(where, slice):
        x[where] = values
    else:
        x.index_copy_(0, where, values)


def _by_head(x: Float[Tensor, "T G d"], where: slice | Tensor) -> Float[Tensor, "G n d"]:
    """Rows head by head, copied: a product with strided rows costs more than the copy."""
    return _take(x, where).transpose(0, 1).contiguous()


def _by_group(
    x: Float[Tensor, "T H d"], where: slice | Tensor, groups: int, scale: float = 1.0
) -> Float[Tensor, "G rn d"]:
    """Rows of all heads that share keys, one head after another, times a scale."""
    rows = _take(x, where).transpose(0, 1)
    rows = rows.contiguous() if scale == 1.0 else rows * scale
    return rows.reshape(groups, -1, x.shape[-1])


def _by_token(x: Float[Tensor, "G rn d"], heads: int) -> Float[Tensor, "n H d"]:
    return x.reshape(heads, -1, x.shape[-1]).transpose(0, 1)


def _scores(
    q: Float[Tensor, "G rb d"], k: Float[Tensor, "G s d"], hidden: Bool[Tensor, "b s"] | None
) -> Float[Tensor, "G rb s"]:
    scores = torch.bmm(q, k.transpose(1, 2))
    if hidden is not None:  # a sum is several times faster than masked_fill, whose mask does not broadcast well
        scores.unflatten(1, (-1, len(hidden))).add_(hidden.to(scores.dtype).mul_(HIDDEN))
    return scores


def _accumulate(
    total: Float[Tensor, "T G d"],
    where: slice | Tensor,
    weights: Float[Tensor, "G rb s"],
    rows: Float[Tensor, "G rb d"],
) -> None:
    """Add what each key gathers from the queries."""
    weights = weights.transpose(1, 2)
    if isinstance(where, slice) and rows.dtype == total.dtype:
        total[where].transpose(0, 1).baddbmm_(weights, rows)
    elif isinstance(where, slice):
        total[where] += torch.bmm(weights, rows).transpose(0, 1)
    else:
        total.index_add_(0, where, torch.bmm(weights, rows).transpose(0, 1).to(total.dtype))
