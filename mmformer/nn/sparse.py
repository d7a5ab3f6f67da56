"""Attention under a rule that hides most keys: windows, dilated ones, global tokens, blocks, computed where it is seen.

Tokens are put in an order in which those that see one another adjoin, and cut into tiles of queries and blocks of keys.
The boxes around both tell which blocks a tile may see, so that no two tokens far apart are ever compared; within what
is left the rule itself says who sees whom, and keys that no query of the tile sees are dropped. So every rule is exact,
whatever the mix of segments and modalities, and the cost is that of what is seen, rounded up to tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from mmformer.nn.tiles import Tile, attend_tiles
from mmformer.patterns import Box
from mmformer.tokens import Tokens
from mmformer.visibility import Sight, Visibility

KEY_BLOCK = 32
"""Tokens in a block of keys: small, as whole blocks are compared with the tile's box and then trimmed."""
PATCH = 8
"""Rows and columns of the part of a picture whose tokens adjoin."""
LARGEST_TILE = 128 * 4096
"""Scores for a head: more are cut into tiles of fewer queries, so that they stay small beside queries and keys."""


def sparse(
    q: Float[Tensor, "B Tq H d"], k: Float[Tensor, "B Tk G d"], v: Float[Tensor, "B Tk G e"], sight: Sight
) -> Float[Tensor, "B Tq H e"]:
    """Attention that computes what the rule shows, in packed and padded rows; made for rules that hide most keys."""
    out = attend_tiles(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), sight.kept(tiles))
    return out.unflatten(0, q.shape[:2])


def entries(sight: Sight) -> int:
    """How many scores `sparse` computes for a head."""
    return sum(tile.entries for tile in sight.kept(tiles))


def tiles(sight: Sight) -> tuple[Tile, ...]:
    """What each tile of queries looks at, as indices into the flattened rows."""
    queries, keys = (_sorted(sight, *side) for side in zip((sight.query, sight.key), row_owners(sight), strict=True))
    blocks = _boxes(keys, _cuts(keys, KEY_BLOCK))
    size = max((rule.tile for rule in sight.visibility.rules), default=128)
    plan = _Plan(sight.visibility, queries, keys, blocks)
    boxes = _boxes(queries, _cuts(queries, size))
    return tuple(tile for i in range(len(boxes.spans)) for tile in plan.tile(boxes, i))


@dataclass(frozen=True, slots=True)
class _Side:
    """Tokens in the order of their tiles: their places in the flattened rows, and what they are."""

    index: Int64[np.ndarray, " n"]
    owner: Int64[np.ndarray, " n"]
    modality: Int64[np.ndarray, " n"]
    position: Int64[np.ndarray, "n 3"]
    residue: Int64[np.ndarray, "n 3"]
    last: Int64[np.ndarray, " n"]
    is_global: Bool[np.ndarray, " n"]

    def take(self, chosen: np.ndarray | slice) -> _Side:
        return _Side(*(getattr(self, name)[chosen] for name in _Side.__slots__))


@dataclass(frozen=True, slots=True)
class _Boxes:
    """Runs of sorted tokens, and the least and greatest of what they are."""

    spans: tuple[slice, ...]
    low: _Side
    high: _Side


def row_owners(sight: Sight) -> tuple[Int[Tensor, "B Tq"], Int[Tensor, "B Tk"]]:
    """What must be equal for a query to see a key, rows told apart; -1 for padding."""
    mine, theirs = sight.owners
    count = 1 + max(int(owner.max()) if owner.numel() else 0 for owner in (mine, theirs))
    rows = torch.arange(len(mine), device=mine.device)[:, None] * count
    return torch.where(mine < 0, -1, mine + rows), torch.where(theirs < 0, -1, theirs + rows)


def _sorted(sight: Sight, tokens: Tokens, owner: Tensor) -> _Side:
    rules = sight.visibility.rules
    found = torch.zeros_like(owner, dtype=torch.bool)
    for rule in rules:
        found = found | rule.is_global(tokens.modality, tokens.position)
    last = sight.last if tokens is sight.query and sight.last is not None else torch.zeros_like(owner)
    position = tokens.position.flatten(0, 1).cpu().numpy()
    owners, modality, latest, is_global = (t.flatten().cpu().numpy() for t in (owner, tokens.modality, last, found))
    residue = position % (rules[0].period if rules else 1)
    side = _Side(np.arange(len(owners)), owners, modality, position, residue, latest, is_global)
    side = side.take(owners >= 0)
    columns = [
        side.position[:, 2], side.position[:, 1], *(side.position[:, i] // PATCH for i in (2, 1)), side.position[:, 0],
        *side.residue.T, side.modality, side.owner, ~side.is_global,
    ]  # fmt: skip
    varying = [column for column in columns if len(column) and (column[0] != column).any()]
    return side.take(np.lexsort(varying)) if varying else side


def _cuts(side: _Side, size: int) -> Int64[np.ndarray, " n"]:
    """Where tiles of `size` start: anew in each segment, unless the segments are as short as that."""
    total = len(side.owner)
    if not total:
        return np.zeros(0, dtype=np.int64)
    changes = (np.diff(side.owner) != 0) | (np.diff(side.is_global.astype(np.int8)) != 0)
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    if len(starts) * 2 * size > total:
        return np.arange(0, total, size)
    ends = np.concatenate([starts[1:], [total]])
    return np.concatenate([np.arange(a, b, size) for a, b in zip(starts, ends, strict=True)])


def _boxes(side: _Side, starts: Int64[np.ndarray, " n"]) -> _Boxes:
    if not len(starts):
        return _Boxes((), side, side)
    stops = [*starts[1:].tolist(), len(side.owner)]
    low = _Side(*(np.minimum.reduceat(getattr(side, name), starts, axis=0) for name in _Side.__slots__))
    high = _Side(*(np.maximum.reduceat(getattr(side, name), starts, axis=0) for name in _Side.__slots__))
    return _Boxes(tuple(map(slice, starts.tolist(), stops)), low, high)


class _Plan:
    """What tiles look at, under a rule. Tiles that differ by a shift alone share what is hidden in them."""

    def __init__(self, rule: Visibility, queries: _Side, keys: _Side, blocks: _Boxes):
        self.rule, self.queries, self.keys, self.blocks = rule, queries, keys, blocks
        self.shifts = not rule.current and all(pattern.shifts for pattern in rule.rules)
        self.known: dict[tuple[bytes, ...], Tensor] = {}

    def tile(self, boxes: _Boxes, i: int) -> Iterator[Tile]:
        """The tile of box i; several where it has too many keys, and none where it sees nothing."""
        queries = self.queries.take(boxes.spans[i])
        chosen = self._candidates(boxes.low.take(slice(i, i + 1)), boxes.high.take(slice(i, i + 1)))
        spans = [np.arange(self.blocks.spans[j].start, self.blocks.spans[j].stop) for j in chosen]
        if not spans:
            return
        keys = self.keys.take(np.concatenate(spans))
        keys = keys if (np.diff(keys.index) > 0).all() else keys.take(np.argsort(keys.index))
        step = max(1, LARGEST_TILE // len(keys.index))
        for start in range(0, len(queries.index), step):
            yield from self._exact(queries.take(slice(start, start + step)), keys)

    def _candidates(self, low: _Side, high: _Side) -> Int64[np.ndarray, " m"]:
        """The blocks of keys that a tile may see."""
        least, most = self.blocks.low, self.blocks.high
        seen = np.ones(len(self.blocks.spans), dtype=bool)
        last = int(low.last[0]) if low.owner[0] == high.owner[0] else -1
        for rule in self.rule.rules:
            seen &= rule.may(Box(low.position[0], high.position[0], last), Box(least.position, most.position))
        seen &= ((least.residue <= high.residue) & (low.residue <= most.residue)).all(1)
        one_modality = (least.modality == high.modality) & (low.modality == most.modality)
        seen |= ~one_modality | most.is_global | high.is_global
        seen &= (least.owner <= high.owner) & (low.owner <= most.owner)
        if self.rule.causal:
            seen &= least.position[:, 0] <= high.position[:, 0]
        return np.flatnonzero(seen)

    def _exact(self, queries: _Side, keys: _Side) -> Iterator[Tile]:
        seen = self._seen(queries, keys)
        rows, columns = seen.any(1), seen.any(0)
        if not rows.any():
            return
        hidden = None if seen.all() else ~seen
        if hidden is not None and not (rows.all() and columns.all()):
            hidden = hidden[rows][:, columns]
            hidden = hidden if hidden.any() else None
        yield Tile(where(queries.index[rows.numpy()]), where(keys.index[columns.numpy()]), hidden)

    def _seen(self, queries: _Side, keys: _Side) -> Bool[Tensor, "b s"]:
        if not self.shifts:
            return self._allowed(queries, keys)
        place, owner = queries.position[:1], queries.owner[:1]
        parts = [(side.position - place, side.owner - owner, side.modality) for side in (queries, keys)]
        signature = tuple(array.tobytes() for part in parts for array in part)
        if signature not in self.known:
            self.known[signature] = self._allowed(queries, keys)
        return self.known[signature]

    def _allowed(self, queries: _Side, keys: _Side) -> Bool[Tensor, "b s"]:
        q, k = ([torch.from_numpy(a) for a in (side.modality, side.position, side.owner)] for side in (queries, keys))
        last = torch.from_numpy(queries.last)[:, None]
        allowed = self.rule.allows(q[0][:, None], q[1][:, None], k[0][None], k[1][None], last)
        return allowed & (q[2][:, None] == k[2][None])


def where(index: Int64[np.ndarray, " n"]) -> slice | Tensor:
    """Tokens of a row, as a span where they adjoin."""
    if len(index) == 1 or (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(np.ascontiguousarray(index))
