"""Files that are the same, and files that are nearly the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

STRETCH = 1.02
"""Two that are nearly the same have durations, or aspects, of no larger ratio than this."""
_BANDS = 12
_MOST = 64
"""Fingerprints that share a band are all compared up to so many; of more, each with those that sort beside it."""
_TIE = 0.05


def same(keys: Sequence[Hashable]) -> Int[np.ndarray, " N"]:
    """A number for each key that equal keys share."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def nearly(
    classes: Int[np.ndarray, " N"],
    prints: Sequence[Float[np.ndarray, "9 9"] | None],
    extents: Sequence[float | int],
    correlation: float,
) -> Int[np.ndarray, " N"]:
    """The classes, joined where their fingerprints correlate so highly; what has no fingerprint stays as it is.

    `extents` are durations, or aspects. Candidates share 12 of the 144 bits that say which of two neighbours is larger
    (dHash in both directions).
    """
    held = [i for i, grid in enumerate(prints) if grid is not None]
    parent = list(range(int(classes.max()) + 1 if len(classes) else 0))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    if held:
        grids = np.stack([np.asarray(prints[i]) for i in held])
        flat = grids.reshape(len(held), -1)
        extent = [extents[i] for i in held]
        for a, b in _candidates(bits(grids)):
            one, other = root(int(classes[held[a]])), root(int(classes[held[b]]))
            if one == other or max(extent[a], extent[b]) > STRETCH * min(extent[a], extent[b]):
                continue
            if flat[a] @ flat[b] >= correlation * flat.shape[1]:
                parent[max(one, other)] = min(one, other)
    return np.array([root(i) for i in classes.tolist()], dtype=np.int64)


def bits(grids: Float[np.ndarray, "N 9 9"]) -> Bool[np.ndarray, "N 144"]:
    """Which of two neighbours is larger, along both axes."""
    steps = [np.diff(grids, axis=axis).reshape(len(grids), -1) for axis in (1, 2)]
    return np.concatenate(steps, 1) > _TIE


def _candidates(hashes: Bool[np.ndarray, "N 144"]) -> Iterator[tuple[int, int]]:
    """Pairs that agree on one band of bits at least."""
    packed = np.packbits(hashes, axis=1)
    # bits spread over the bands, so that a flat region does not fill one
    for start in range(_BANDS):
        key = np.packbits(hashes[:, start::_BANDS], axis=1)
        order = np.lexsort((*packed.T[::-1], *key.T[::-1]))
        sorted_key = key[order]
        borders = np.flatnonzero((sorted_key[1:] != sorted_key[:-1]).any(1)) + 1
        for group in np.split(order, borders):
            reach = len(group) if len(group) <= _MOST else 8
            for i, a in enumerate(group.tolist()):
                yield from ((a, b) for b in group[i + 1 : i + reach].tolist())
