"""Which rows train, validate and test: a column that says so, a column of folds, or a seeded hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mmformer.datasets.tables import ManifestError

SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = range(3)
_NAMES = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
_SHARE = 0.1


def split_by_name(column: str, cells: Sequence[Any], ids: Sequence[str], seed: int) -> Int[np.ndarray, " N"]:
    """The split of each row from a column of `train`, `val` (or `valid`, `validation`) and `test`, in any case.

    Where no row is to validate, a tenth of those that train does, chosen by a seeded hash of their ids.

    Raises:
        ManifestError: another value, or an empty cell, naming its rows.
    """
    codes = np.array([_NAMES.get(str(value).strip().lower(), -1) for value in cells], dtype=np.int64)
    wrong = np.flatnonzero(codes < 0)
    if len(wrong):
        folds = len(set(cells)) > 2 and all(str(value).strip().isdecimal() for value in cells)
        if folds:
            raise ManifestError(
                f"column {column!r} holds folds {', '.join(_folds(cells))}: choose one to test with data.fold=1"
            )
        some = ", ".join(f"row {ids[i]!r} has {cells[i] or 'no value'!r}" for i in wrong[:5].tolist())
        raise ManifestError(
            f"column {column!r}: {some}{', ...' if len(wrong) > 5 else ''} ({len(wrong)} rows): "
            "write train, val or test, or set data.columns.split=null to split by a hash of the id"
        )
    train = np.flatnonzero(codes == TRAIN)
    if len(train) > 1 and VAL not in codes:
        ranked = train[np.argsort(_hashes([ids[i] for i in train.tolist()], seed), kind="stable")]
        codes[ranked[: max(1, round(_SHARE * len(train)))]] = VAL
    return codes


def split_by_fold(column: str, cells: Sequence[Any], fold: int) -> Int[np.ndarray, " N"]:
    """Fold `fold` tests, the next one validates (after the last comes the first), the others train.

    Raises:
        ManifestError: no such fold, fewer than three, or an empty cell.
    """
    if None in cells:
        raise ManifestError(f"column {column!r}: {sum(v is None for v in cells)} rows have no fold: fill them in")
    folds = _folds(cells)
    if str(fold) not in folds or len(folds) < 3:
        raise ManifestError(
            f"column {column!r} holds folds {', '.join(folds)}, data.fold={fold}: give one of at least three"
        )
    test = folds.index(str(fold))
    parts = {name: TRAIN for name in folds} | {folds[(test + 1) % len(folds)]: VAL, folds[test]: TEST}
    return np.array([parts[_fold(value)] for value in cells], dtype=np.int64)


def split_by_hash(keys: Sequence[str], seed: int) -> Int[np.ndarray, " N"]:
    """Train, validate and test with 80, 10 and 10 % of the rows, by a hash of their keys: their order plays no part.

    Of three rows or more each split gets one; a row added later changes the split of few others.
    """
    hashes = _hashes(keys, seed)
    ranked = np.argsort(hashes, kind="stable")
    counts = [int((hashes < part * _SHARE).sum()) for part in (1, 2)]
    least, rest = int(len(keys) >= 3), len(keys) - 1
    test = min(max(least, counts[0]), rest - least)
    val = min(max(least, counts[1] - counts[0]), rest - test)
    codes = np.full(len(keys), TRAIN, dtype=np.int64)
    codes[ranked[test : test + val]] = VAL
    codes[ranked[:test]] = TEST
    return codes


def _hashes(keys: Sequence[str], seed: int) -> np.ndarray:
    """A number in [0, 1) for each key, the same on every machine."""
    start = hashlib.blake2b(f"{seed}:".encode(), digest_size=8)
    numbers = np.empty(len(keys), dtype=np.uint64)
    for i, key in enumerate(keys):
        state = start.copy()
        state.update(key.encode("utf-8", "surrogatepass"))
        numbers[i] = int.from_bytes(state.digest(), "little")
    return numbers / 2.0**64


def _fold(value: Any) -> str:
    return str(value).strip().removesuffix(".0")


def _folds(cells: Sequence[Any]) -> list[str]:
    names = {_fold(value) for value in cells}
    return sorted(names, key=lambda name: (int(name), name) if name.isdecimal() else (1 << 62, name))
