"""The account of a load: every tensor of the file and every tensor of the model, each on exactly one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

LOADED = ("loaded", "renamed", "reshaped", "transposed", "joined", "split", "copied", "computed", "resized", "tied")
"""A status whose targets now hold what the file says."""

HERE = ("zero-filled", "configured", "new")
"""A status whose targets hold something that is not in the file, by design."""

WRONG = ("missing", "unexpected", "mismatched")

WIDTH = 100
"""Characters of a line beyond which a move is written on two."""

SHOWN = 12
"""Lines of one status that a message shows."""


class Item(NamedTuple):
    """A tensor by name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def size(self) -> str:
        """Its shape, for people."""
        return "x".join(map(str, self.shape)) or "scalar"


@dataclass(frozen=True)
class Line:
    """What became of some tensors of the file (`sources`) or of the model (`targets`)."""

    status: str
    sources: tuple[Item, ...] = ()
    targets: tuple[Item, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Every source and every target tensor of a load, each on exactly one line."""

    origin: str
    lines: tuple[Line, ...]

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines)

    def of(self, *statuses: str) -> list[Line]:
        """The lines with one of these statuses."""
        return [line for line in self.lines if line.status in statuses]

    @property
    def ok(self) -> bool:
        """Whether nothing is missing, unexpected or mismatched."""
        return not self.of(*WRONG)

    @property
    def share(self) -> float:
        """The share of the model's parameters that come from the file."""
        return _parameters(self.of(*LOADED)) / max(1, _parameters(self.lines))

    def summary(self) -> str:
        """One line: how much of the model came from the file, and how much of the file was used."""
        targets = sum(len(line.targets) for line in self.lines)
        filled = sum(len(line.targets) for line in self.of(*LOADED))
        sources = sum(len(line.sources) for line in self.lines)
        used = sum(len(line.sources) for line in self.of(*LOADED))
        return (
            f"{filled} of {targets} tensors, {self.share:.1%} of {_parameters(self.lines):,} weights, "
            f"from {used} of {sources} tensors in {self.origin}"
        )

    def table(self) -> str:
        """The counts by status, and every line that is not a plain copy."""
        total = max(1, _parameters(self.lines))
        rows = [f"{'status':<12} {'in file':>8} {'in model':>9} {'weights':>15} {'share':>7}"]
        for status in (*LOADED, *HERE, "ignored", *WRONG):
            if lines := self.of(status):
                sources, targets = (sum(len(getattr(line, side)) for line in lines) for side in ("sources", "targets"))
                weights = _parameters(lines)
                rows.append(f"{status:<12} {sources:>8} {targets:>9} {weights:>15,} {weights / total:>7.1%}")
        return "\n".join([*rows, *self.details()])

    def details(self, *statuses: str) -> list[str]:
        """The lines with these statuses, or all that are no plain copies; layers that went the same way share one."""
        chosen = statuses or tuple(s for s in (*LOADED, *HERE, "ignored", *WRONG) if s not in ("loaded", "renamed"))
        out = []
        for status in chosen:
            grouped = list(_grouped(self.of(status)))
            out += [f"{status}: {text}" for text in grouped[:SHOWN]]
            if len(grouped) > SHOWN:
                out.append(f"{status}: and {len(grouped) - SHOWN} more")
        if not statuses and (text := self._converted()):
            out.append(f"converted: {text}")
        return out

    def _converted(self) -> str:
        """Types of the file that the model does not have, with counts."""
        counts: dict[str, int] = {}
        for line in self.of(*LOADED):
            if line.sources and line.targets and line.sources[0].dtype != line.targets[0].dtype:
                pair = f"{short(line.sources[0].dtype)} to {short(line.targets[0].dtype)}"
                counts[pair] = counts.get(pair, 0) + len(line.targets)
        return ", ".join(f"{count} tensors from {pair}" for pair, count in counts.items())

    def __str__(self) -> str:
        return f"{self.summary()}\n{self.table()}"


class MisfitError(ValueError):
    """Weights that do not fit the model; nothing of them was loaded. `report` has every tensor."""

    def __init__(self, report: Report, advice: str):
        super().__init__("\n".join([f"{report.origin} does not fit the model:", *report.details(*WRONG), advice]))
        self.report = report


def short(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _parameters(lines: Iterable[Line]) -> int:
    """Weights of the model on these lines; a tied copy is no weight of its own."""
    return sum(item.numel for line in lines if line.status != "tied" for item in line.targets)


def _grouped(lines: Iterable[Line]) -> Iterator[str]:
    """A text for each line; those that differ in the numbers of their layers alone share one, which counts them."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", _text(line)), []).append(line)
    for group in groups.values():
        words = zip(*(re.split(r"([. ])", _text(line)) for line in group), strict=True)
        text = "".join(same[0] if len(set(same)) == 1 else "*" for same in words)
        yield text if len(group) == 1 else f"{len(group)} x {text}"


def _text(line: Line) -> str:
    text = "\n    -> ".join(filter(None, (_side(line.sources), _side(line.targets))))
    text = text if len(text) > WIDTH else text.replace("\n    ", " ")
    return f"{text}: {line.note}" if line.note else text


def _side(items: tuple[Item, ...]) -> str:
    """Tensors with their shapes; those of one shape whose names differ in one word share one name."""
    words = [item.name.split(".") for item in items]
    if len(items) > 1 and len({(item.shape, len(w)) for item, w in zip(items, words, strict=True)}) == 1:
        columns = [list(dict.fromkeys(column)) for column in zip(*words, strict=True)]
        if sum(len(column) > 1 for column in columns) == 1:
            name = ".".join(c[0] if len(c) == 1 else "{" + ",".join(c) + "}" for c in columns)
            return f"{name} ({items[0].size} each)"
    return ", ".join(f"{item.name} ({item.size})" for item in items)
