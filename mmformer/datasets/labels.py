"""What a column of labels means: one class, several classes or a number, and the target of each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mmformer.datasets.tables import Column, ManifestError, values

Kind = Literal["Classes", "Labels", "Number"]

MISSING_CLASS = -100
_SEPARATOR = "|"
_FEW = 20


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target of every row. `names` are the classes in order, none for a number.

    `values` holds a class index a row (-100 where absent), a number a row (NaN where absent), or for several classes
    the class indices of all rows end to end, row i those of `offsets[i]` to `offsets[i + 1]` (where absent: one -100).
    `mean` and `std` are those of a number over the rows that train.
    """

    column: str
    kind: Kind
    names: tuple[str, ...]
    values: np.ndarray
    offsets: np.ndarray | None = None
    mean: float = 0.0
    std: float = 1.0

    @property
    def num_outputs(self) -> int:
        return len(self.names) or 1

    @property
    def present(self) -> np.ndarray:
        """Which rows have it."""
        if self.offsets is not None:
            first = np.append(self.values, 0)[self.offsets[:-1]]
            return (first != MISSING_CLASS) | (np.diff(self.offsets) == 0)
        return ~np.isnan(self.values) if self.kind == "Number" else self.values != MISSING_CLASS

    def rows(self, indices: np.ndarray) -> Tensor:
        """The targets of some rows: classes int64 (B,), numbers float32 (B,), several classes 0-1 (B, classes)."""
        if self.offsets is None:
            return torch.from_numpy(self.values[indices])
        out = np.zeros((len(indices), len(self.names)), dtype=np.float32)
        for row, index in enumerate(indices):
            marked = self.values[self.offsets[index] : self.offsets[index + 1]]
            if MISSING_CLASS in marked:
                out[row] = math.nan
            else:
                out[row, marked] = 1.0
        return torch.from_numpy(out)


def read_target(
    column: str,
    cells: Column,
    ids: Sequence[str],
    *,
    kind: Kind | None = None,
    names: Sequence[str] | None = None,
    train: np.ndarray | None = None,
) -> Target:
    """Read a column of labels.

    Without a `kind`: lists and cells such as `cat|dog` are several classes, other strings one class, fractions
    numbers. Whole numbers are classes where they are few, as often 0 to 9 are, and numbers where they are many.
    `names` fixes the classes, as those of a trained model; `train` marks the rows that a number's mean is taken over.

    Raises:
        ManifestError: a label that is NaN, not a number, or not one of `names`, naming its rows.
    """
    found = _Cells.of(column, cells, ids)
    if not found.distinct:
        raise ManifestError(f"column {column!r} has no label in any of {len(ids)} rows: map another, or set it to null")
    numbers = [_number(value) for value in found.distinct]
    kind = kind or _infer(found, numbers)
    if kind == "Number":
        return _numbers(found, numbers, train)
    marked = [_names(value, kind == "Labels") for value in found.distinct]
    known = tuple(names) if names else _order({name for row in marked for name in row})
    place = {name: i for i, name in enumerate(known)}
    found.refuse(
        [any(name not in place for name in row) for row in marked], f"none of the {len(known)} classes {_some(known)}"
    )
    codes = [[place[name] for name in row] for row in marked]
    if kind == "Labels":
        rows = [codes[i] if i >= 0 else [MISSING_CLASS] for i in found.place.tolist()]
        offsets = np.cumsum([0, *map(len, rows)])
        return Target(
            column=column, kind=kind, names=known, values=np.array(list(chain(*rows)), np.int64), offsets=offsets
        )
    found.refuse([len(row) != 1 for row in codes], "several classes, and the kind is Classes")
    return Target(
        column=column, kind=kind, names=known, values=found.spread([*(row[0] for row in codes), MISSING_CLASS])
    )


@dataclass(frozen=True)
class _Cells:
    """A column as its distinct values, and which of them each row has (-1 for an empty cell)."""

    column: str
    ids: Sequence[str]
    distinct: list[Any]
    place: Int[np.ndarray, " N"]

    @classmethod
    def of(cls, column: str, cells: Column, ids: Sequence[str]) -> _Cells:
        seen: dict[Any, int] = {}
        distinct, place = [], []
        for value in values(cells):
            value = value.strip() or None if isinstance(value, str) else value
            key = repr(value) if isinstance(value, list) else (type(value), value)  # True, 1 and 1.0 are equal
            if value is not None and key not in seen:
                seen[key] = len(distinct)
                distinct.append(value)
            place.append(seen.get(key, -1))
        return cls(column, ids, distinct, np.array(place, dtype=np.int64))

    def spread(self, found: list[Any]) -> np.ndarray:
        """The value of every row, from those of the distinct cells and, last, that of an empty one."""
        return np.array(found)[self.place]

    def refuse(self, wrong: Sequence[bool], why: str) -> None:
        """Raise an error that names the rows of wrong cells."""
        rows = np.flatnonzero(self.spread([*wrong, False])).tolist()
        if rows:
            listed = "; ".join(f"row {self.ids[i]!r} has {self.distinct[self.place[i]]!r}" for i in rows[:5])
            more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
            raise ManifestError(f"column {self.column!r}: {listed}{more}: {why}")


def _infer(found: _Cells, numbers: Sequence[float | None]) -> Kind:
    if any(isinstance(value, list) or (isinstance(value, str) and _SEPARATOR in value) for value in found.distinct):
        return "Labels"
    if any(number is None for number in numbers):
        return "Classes"
    if not all(number is not None and number.is_integer() for number in numbers):
        return "Number"
    different, count = set(numbers), int((found.place >= 0).sum())
    in_a_row = different in (set(range(len(different))), set(range(1, len(different) + 1)))
    few = len(different) <= max(2, min(_FEW, count // 2))
    return "Classes" if few or (in_a_row and count >= 2 * len(different)) else "Number"


def _numbers(found: _Cells, numbers: Sequence[float | None], train: np.ndarray | None) -> Target:
    found.refuse([number is None or not math.isfinite(number) for number in numbers], "not a finite number")
    spread = found.spread([*numbers, math.nan])
    seen = spread if train is None else spread[train]
    seen = seen[~np.isnan(seen)]
    mean, std = (float(seen.mean()), float(seen.std()) or 1.0) if len(seen) else (0.0, 1.0)
    return Target(column=found.column, kind="Number", names=(), values=spread.astype(np.float32), mean=mean, std=std)


def _number(value: Any) -> float | None:
    if isinstance(value, list | bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _names(value: Any, split: bool) -> list[str]:
    parts = value if isinstance(value, list) else str(value).split(_SEPARATOR) if split else [value]
    return [name for part in parts if (name := _name(part))]


def _name(value: Any) -> str:
    """A class as a string. 1.0 is class "1": so other tools write it once a cell of its column is empty."""
    text = str(value).strip()
    return text.removesuffix(".0") if text.removesuffix(".0").lstrip("-").isdecimal() else text


def _order(names: set[str]) -> tuple[str, ...]:
    """Whole numbers by size, then other names by the alphabet."""
    return tuple(sorted(names, key=lambda n: (0, int(n), n) if n.lstrip("-").isdecimal() else (1, 0, n)))


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
