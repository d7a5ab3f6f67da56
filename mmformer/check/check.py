"""Every cell of a manifest looked at once, and what follows from that for its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mmformer.check.look import Limits, Look, look_at_text, looking
from mmformer.check.pool import each
from mmformer.check.twins import nearly, same
from mmformer.datasets.conversations import TURNS, read_conversations
from mmformer.datasets.integrity import key
from mmformer.datasets.labels import MISSING_CLASS
from mmformer.datasets.manifest import Manifest, read_manifest
from mmformer.datasets.sources import DecodeError, Source
from mmformer.datasets.splits import SPLITS, TRAIN
from mmformer.datasets.tables import SUFFIXES, read_table

CORRELATION = {"image": 0.985, "audio": 0.998}
"""Of fingerprints, from which on two files are taken for nearly the same; one voice says a word alike many times."""
FEW = 2
"""Of a class with fewer rows that train than this nothing can be learned."""


@dataclass(frozen=True, kw_only=True)
class View:
    """The cells of one modality: cell i of `manifest` belongs to row `rows[i]` of the whole."""

    modality: str
    manifest: Manifest
    rows: Int[np.ndarray, " N"]

    @property
    def codes(self) -> Int[np.ndarray, " N"]:
        return self.manifest.inputs[self.modality].codes


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A cell that cannot be used: `row` counts from 1, as the rows below the header do."""

    row: int
    id: str
    column: str
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Twins:
    """How often something stands in several places: whole rows (`modality` "row"), or the cells of one modality.

    `copies` counts all but the first of each, `leaked` the rows by split that have what a row that trains has too.
    `pairs` are examples: a row that does not train, and one that does.
    """

    modality: str
    nearly: bool
    copies: int
    leaked: dict[str, int]
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was found. `looks` are those of each modality by its cells' codes, `views` the cells."""

    manifest: Manifest
    views: tuple[View, ...]
    looks: dict[str, dict[int, Look]]
    broken: tuple[Broken, ...]
    odd: tuple[Broken, ...]
    twins: tuple[Twins, ...]
    warnings: tuple[str, ...]

    @property
    def num_files(self) -> int:
        return sum(len(looks) for name, looks in self.looks.items() if name != "text")

    @property
    def broken_rows(self) -> Int[np.ndarray, " n"]:
        """Rows (from 0) with at least one broken cell."""
        return np.unique([fault.row - 1 for fault in self.broken]).astype(np.int64)

    def plain(self) -> dict[str, Any]:
        """The findings in plain values."""
        return {
            "manifest": str(self.manifest.path),
            "rows": len(self.manifest),
            "files": self.num_files,
            "broken_rows": len(self.broken_rows),
            "broken": [asdict(fault) for fault in self.broken],
            "odd": [asdict(fault) for fault in self.odd],
            "twins": [asdict(twins) for twins in self.twins],
            "warnings": list(self.warnings),
        }

    def checksums(self) -> dict[str, str]:
        """The sha256 of each whole file by its name."""
        found = {}
        for view in self.views:
            if view.modality == "text":
                continue
            codes, first = np.unique(view.codes, return_index=True)
            for code, cell in zip(codes.tolist(), first.tolist(), strict=True):
                look = self.looks[view.modality].get(code)
                if look is not None and not look.reason:
                    source = view.manifest.source(view.modality, cell)
                    assert source is not None
                    found[key(source, self.manifest.sums)] = look.digest
        return found


def open_views(path: Path, columns: dict[str, str | None], **options: Any) -> tuple[Manifest, tuple[View, ...]]:
    """A manifest, or a file of conversations (with a column `turns`), as training opens it; the cells of each modality.

    `options` are those of `read_manifest`. Raises ManifestError as that does.
    """
    if not columns and path.suffix.lower() in SUFFIXES and TURNS in read_table(path).columns:
        known = {name: value for name, value in options.items() if name in ("references", "checksums", "split_seed")}
        found = read_conversations(str(path), **known, allow_outside_root=options.get("allow_outside_root", False))
        manifest = found.manifest
        views = [View(modality="text", manifest=manifest, rows=np.arange(len(manifest)))]
        for name, media in found.media.items():
            rows = np.repeat(np.arange(len(manifest)), np.diff(found.starts[name]))
            views.append(View(modality=name, manifest=media, rows=rows))
        return manifest, tuple(views)
    manifest = read_manifest(path, columns, **options)
    return manifest, tuple(View(modality=n, manifest=manifest, rows=np.arange(len(manifest))) for n in manifest.inputs)


def check(
    manifest: Manifest,
    views: Sequence[View],
    limits: Limits,
    *,
    seconds: float,
    workers: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Look at every cell once, and list what is broken, odd, there twice, or leaks from a split into another.

    A file may take `seconds`; `tell` hears how many of how many files are done.
    """
    total = sum(len(np.unique(view.codes[view.codes >= 0])) for view in views if view.modality != "text")
    looks: dict[str, dict[int, Look]] = {}
    done = 0
    for view in views:
        found = looks[view.modality] = {}
        for code, look in _looks(view, limits, seconds, workers):
            found[code] = look
            if view.modality != "text":
                done += 1
                tell(done, total)
    broken = [fault for view in views for fault in _listed(manifest, view, looks[view.modality], "reason")]
    return Checked(
        manifest=manifest,
        views=tuple(views),
        looks=looks,
        broken=tuple(broken + _empty(manifest, views, looks, broken)),
        odd=tuple(fault for view in views for fault in _listed(manifest, view, looks[view.modality], "note")),
        twins=(
            _whole_rows(manifest, views, looks),
            *(twins for view in views for twins in _twins(manifest, view, looks[view.modality])),
        ),
        warnings=tuple(_warnings(manifest)),
    )


def _looks(view: View, limits: Limits, seconds: float, workers: int) -> Iterator[tuple[int, Look]]:
    """(code, look) of each distinct cell; what names no file at all has a code of its own for each row."""
    codes, first = np.unique(view.codes, return_index=True)
    held = [(c, f) for c, f in zip(codes.tolist(), first.tolist(), strict=True) if c >= 0]
    if view.modality == "text":
        for code, cell in held:
            if (text := view.manifest.text(cell)) is not None:
                yield code, look_at_text(text)
        return
    asked: list[int] = []
    refused: list[tuple[int, Look]] = []

    def sources() -> Iterator[tuple[str, Source]]:
        for code, cell in held:
            try:
                source = view.manifest.source(view.modality, cell)
            except DecodeError as error:
                refused.append((code, Look(reason=str(error))))
                continue
            if source is not None:
                asked.append(code)
                yield view.modality, source

    for place, look in each(looking(limits), sources(), seconds, workers):
        yield asked[place], Look(reason=str(look)) if isinstance(look, DecodeError) else look
    yield from refused


def _listed(manifest: Manifest, view: View, looks: dict[int, Look], what: str) -> list[Broken]:
    """Every row with a cell that has a `reason` or a `note`, in order."""
    found = []
    for cell, (code, row) in enumerate(zip(view.codes.tolist(), view.rows.tolist(), strict=True)):
        said = getattr(looks[code], what) if code in looks else ""
        if code < -1 and what == "reason":  # a reference to no row
            said = _refused(view, cell)
        if said:
            column, path = view.manifest.inputs[view.modality].name, view.manifest.where(view.modality, cell)
            found.append(Broken(row=row + 1, id=manifest.id(row), column=column, path=path, reason=said))
    return found


def _refused(view: View, cell: int) -> str:
    try:
        view.manifest.source(view.modality, cell)
    except DecodeError as error:
        return str(error)
    return ""


def _empty(
    manifest: Manifest, views: Sequence[View], looks: dict[str, dict[int, Look]], broken: Sequence[Broken]
) -> list[Broken]:
    """Rows that hold nothing, and are not listed for another reason."""
    known = {fault.row - 1 for fault in broken}
    held = {
        row for view in views for code, row in zip(view.codes, view.rows, strict=True) if code in looks[view.modality]
    }
    rows = [row for row in range(len(manifest)) if row not in held and row not in known]
    reason = "none of its cells holds anything"
    return [Broken(row=row + 1, id=manifest.id(row), column="row", path="", reason=reason) for row in rows]


def _twins(manifest: Manifest, view: View, looks: dict[int, Look]) -> Iterator[Twins]:
    """What stands several times in a modality: exactly, and then nearly."""
    codes = [code for code, look in looks.items() if not look.reason]
    exact = same([looks[code].digest for code in codes])
    shapes = [looks[code].shape for code in codes]
    extents = [shape[0] / shape[1] if view.modality == "image" else shape[0] if shape else 0.0 for shape in shapes]
    prints = [looks[code].fingerprint for code in codes]
    near = nearly(exact, prints, extents, CORRELATION.get(view.modality, 1.0))
    for classes, is_near in ((exact, False), (near, True)):
        if is_near and np.array_equal(exact, near):
            continue
        yield _counted(manifest, view, dict(zip(codes, classes.tolist(), strict=True)), is_near)


def _counted(manifest: Manifest, view: View, classes: dict[int, int], is_near: bool) -> Twins:
    cells = [(c, classes[code]) for c, code in enumerate(view.codes.tolist()) if code in classes]
    rows = [(int(view.rows[cell]), found) for cell, found in cells]
    where = [f" ({' '.join(view.manifest.where(view.modality, cell)[:80].split())})" for cell, _ in cells]
    copies = len(classes) - len(set(classes.values()))
    return _leaks(manifest, view.modality, is_near, copies, rows, where)


def _whole_rows(manifest: Manifest, views: Sequence[View], looks: dict[str, dict[int, Look]]) -> Twins:
    """Rows of which everything is the same, in any order within a modality."""
    held: list[list[tuple[str, str]]] = [[] for _ in range(len(manifest))]
    for view in views:
        for code, row in zip(view.codes.tolist(), view.rows.tolist(), strict=True):
            if code in looks[view.modality]:
                held[row].append((view.modality, looks[view.modality][code].digest))
    rows = [row for row, cells in enumerate(held) if cells]
    classes = same([tuple(sorted(held[row])) for row in rows]).tolist()
    copies = len(rows) - len(set(classes))
    return _leaks(manifest, "row", False, copies, list(zip(rows, classes, strict=True)), [""] * len(rows))


def _leaks(
    manifest: Manifest, what: str, is_near: bool, copies: int, rows: list[tuple[int, int]], where: list[str]
) -> Twins:
    """Which rows that do not train have a class in common with one that does; `where` says more of each."""
    trained: dict[int, int] = {}
    for place, (row, found) in enumerate(rows):
        if manifest.split[row] == TRAIN:
            trained.setdefault(found, place)
    leaked = [
        (place, trained[found])
        for place, (row, found) in enumerate(rows)
        if manifest.split[row] != TRAIN and found in trained
    ]
    shown = [tuple(f"{manifest.id(rows[place][0])}{where[place]}" for place in pair) for pair in leaked[:12]]
    counts = Counter(SPLITS[manifest.split[row]] for row in {rows[place][0] for place, _ in leaked})
    leaks = {name: counts[name] for name in SPLITS if counts[name]}
    return Twins(modality=what, nearly=is_near, copies=copies, leaked=leaks, pairs=tuple((a, b) for a, b in shown))


def _warnings(manifest: Manifest) -> Iterator[str]:
    """What a training would get along with, but a person should know."""
    counts = {name: int((manifest.split == code).sum()) for code, name in enumerate(SPLITS)}
    yield from (f"no row is in split {name}" for name, count in counts.items() if not count)
    label = manifest.label
    if label is None:
        return
    if missing := int((~label.present).sum()):
        yield f"{missing:,} rows have no label"
    if not label.names:
        return
    if len(label.names) == 1:
        yield f"one class only: every label is {label.names[0]!r}"
    train = class_counts(manifest)[:, TRAIN]
    for said, found in (
        ("no row that trains", np.flatnonzero(train == 0)),
        ("one row that trains", np.flatnonzero((train > 0) & (train < FEW))),
    ):
        if len(found):
            names = ", ".join(repr(label.names[i]) for i in found[:8].tolist()) + (", ..." if len(found) > 8 else "")
            yield f"{len(found):,} classes have {said}: {names}"


def class_counts(manifest: Manifest) -> Int[np.ndarray, "classes splits"]:
    """How many rows of each split have each class."""
    label = manifest.label
    assert label is not None
    split = manifest.split if label.offsets is None else np.repeat(manifest.split, np.diff(label.offsets))
    held = label.values != MISSING_CLASS
    counts = np.zeros((len(label.names), len(SPLITS)), dtype=np.int64)
    np.add.at(counts, (label.values[held].astype(np.int64), split[held]), 1)
    return counts


def unchecked(manifest: Manifest, views: Sequence[View]) -> tuple[Manifest, tuple[View, ...]]:
    """The same without comparing checksums, for taking them anew."""
    bare = tuple(replace(view, manifest=replace(view.manifest, checksums=None)) for view in views)
    return replace(manifest, checksums=None), bare
