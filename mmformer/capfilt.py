"""CapFilt (BLIP, arXiv 2201.12086, section 3.3): write texts for pictures or sounds, and drop texts that do not fit.

found = capfilt(load(captioner), load(matcher), "web.csv")
rows, references = found.table(Path("clean.csv"), {})
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmformer.batch import Batch
from mmformer.datasets.dataset import collate
from mmformer.datasets.manifest import ABSENT, Manifest
from mmformer.datasets.sources import DecodeError
from mmformer.datasets.splits import SPLITS
from mmformer.datasets.tables import ManifestError, cell
from mmformer.generation import Limits, Sampling, Search
from mmformer.judging import Judging
from mmformer.predict import Predictor
from mmformer.writing import Writing

ORIGINAL, SYNTHETIC = "original", "synthetic"
THRESHOLD = 0.5
NUCLEUS = Sampling(top_p=0.9)
"""The search of the paper: texts that are drawn are more diverse than those of a beam, and teach more (its table 2)."""
MAX_LENGTH = 64


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A row of a manifest with one text, which the manifest had or a model wrote (`source`).

    `match` is the probability that they belong together; None where that was not asked.
    """

    row: int
    source: str
    text: str
    match: float | None
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """All pairs, kept or not; `faults` has a line for each row whose `modality` cannot be read."""

    manifest: Manifest
    modality: str
    pairs: tuple[Pair, ...]
    faults: tuple[str, ...]

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each source how many pairs were kept, of how many that were judged."""
        judged = {source: [p for p in self.pairs if p.match is not None and p.source == source]
                  for source in (ORIGINAL, SYNTHETIC)}  # fmt: skip
        return {source: (sum(pair.kept for pair in pairs), len(pairs)) for source, pairs in judged.items()}

    def table(self, path: Path, references: Mapping[str, str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The rows of a manifest at `path` with the pairs that are kept, and its references (`data.references`).

        Its column of media says what that of the manifest says where they lie in one folder, and otherwise refers to
        the manifest's rows by their ids. `references` are those that the manifest was read with.

        Raises:
            ManifestError: a manifest that cannot be referred to, as it has no ids.
        """
        media, reference = _media(self.manifest, self.modality, path, references)
        rows = [
            {
                "id": self.manifest.id(pair.row) + (f"~{SYNTHETIC}" if pair.source == SYNTHETIC else ""),
                "split": SPLITS[self.manifest.split[pair.row]],
                self.modality: media(pair.row),
                "text": pair.text,
                "source": pair.source,
                "match": None if pair.match is None else round(pair.match, 4),
            }
            for pair in self.pairs
            if pair.kept
        ]
        return rows, {} if reference is None else {self.modality: reference}


def capfilt(
    captioner: Predictor,
    matcher: Predictor,
    path: str | Path,
    modality: str | None = None,
    *,
    split: str | None = "train",
    threshold: float = THRESHOLD,
    search: Search = NUCLEUS,
    max_length: int = MAX_LENGTH,
) -> Filtered:
    """Write a text for each picture (or what `modality` names) of a split, and keep the texts, old and new, that fit.

    A text fits from a probability of `threshold` on, by the matching head of `matcher`. Rows that share a picture get
    one text. Rows of other splits stay as they are, so that what is judged on does not change; None is all splits.

    Raises:
        ManifestError: no such file, split or modality.
        ValueError: a captioner that writes no texts, or a matcher that judges no such pairs.
    """
    manifest = captioner.manifest(path, labelled=True)
    writing = Writing.of(captioner.model, captioner.objectives, captioner.features, captioner.marks)
    judging, text = Judging.of(matcher.model, matcher.objectives), writing.writer.modality
    able = [name for name in judging.partners(text) if name in captioner.features and name in matcher.features]
    chosen = _chosen(manifest, able, modality)
    rows = [row for row in manifest.rows(split).tolist() if manifest.inputs[chosen].codes[row] != ABSENT]
    reading = _Reading(manifest, chosen, text, {})
    given = [(row, own) for row in rows if (own := reading.text_of(row))]
    said = _written(reading, captioner, writing, rows, writing.limits(max_length), search)
    pairs = [
        Pair(row=row, source=source, text=own, match=share, kept=share >= threshold)
        for source, texts in ((ORIGINAL, given), (SYNTHETIC, said))
        for row, own, share in _judged(reading, matcher, judging, texts)
    ]
    others = sorted(set(manifest.rows(None).tolist()) - set(manifest.rows(split).tolist()))
    pairs += [Pair(row=row, source=ORIGINAL, text=reading.text_of(row) or "", match=None, kept=True) for row in others]
    pairs.sort(key=lambda pair: pair.row)
    return Filtered(manifest=manifest, modality=chosen, pairs=tuple(pairs), faults=tuple(reading.faults.values()))


def _written(
    reading: _Reading, captioner: Predictor, writing: Writing, rows: Sequence[int], limits: Limits, search: Search
) -> list[tuple[int, str]]:
    """A text for the first of the rows that share a picture, without those for which nothing is said."""
    firsts = np.unique(reading.manifest.inputs[reading.modality].codes[rows], return_index=True)[1]
    said = []
    for part, batch in reading.batches(captioner, [(rows[i], None) for i in sorted(firsts.tolist())]):
        found = writing.write(writing.prompted(batch.to(captioner.device)), limits, search)
        said += [(row, text) for (row, _), texts in zip(part, found, strict=True) if (text := texts[0].strip())]
    return said


def _judged(
    reading: _Reading, matcher: Predictor, judging: Judging, texts: Sequence[tuple[int, str]]
) -> Iterator[tuple[int, str, float]]:
    """Rows and texts with the probability that they belong together."""
    for part, batch in reading.batches(matcher, texts):
        shares = judging.probabilities(batch.to(matcher.device), (reading.text, reading.modality))
        for (row, text), share in zip(part, shares.tolist(), strict=True):
            yield row, text or "", share


def _chosen(manifest: Manifest, able: Sequence[str], modality: str | None) -> str:
    """What of the rows gets texts."""
    held = [name for name in able if name in manifest.modalities]
    if modality is None and len(held) > 1:
        raise ValueError(f"{manifest.path} has {' and '.join(held)}: say which of them is written about (--modality)")
    if not held or modality not in (None, *held):
        what = modality or "anything that both models read"
        raise ManifestError(
            f"{manifest.path} has no {what}: it has {', '.join(manifest.modalities)}, the models {', '.join(able)}"
        )
    return modality or held[0]


@dataclass(frozen=True)
class _Reading:
    """Rows of a manifest as batches of a picture, or another modality, each with a text that need not be its own."""

    manifest: Manifest
    modality: str
    text: str
    faults: dict[int, str]

    def batches(
        self, predictor: Predictor, pairs: Sequence[tuple[int, str | None]]
    ) -> Iterator[tuple[list[tuple[int, str | None]], Batch]]:
        """Some pairs at a time, without those that cannot be read, which become faults."""
        features = {name: predictor.features[name] for name in (self.modality, self.text)}
        for start in range(0, len(pairs), predictor.batch_size):
            part = list(pairs[start : start + predictor.batch_size])
            values = [{self.modality: self._source(row)} | ({self.text: own} if own else {}) for row, own in part]
            batch = collate(values, features, [self.manifest.id(row) for row, _ in part])
            row_of = {self.manifest.id(row): row for row, _ in part}
            for fault in batch.faults:
                self.faults.setdefault(row_of[fault.id], f"{fault.id}: {fault.column} {fault.path}: {fault.reason}")
            kept = [i for i, have in enumerate(batch.present()) if have == set(values[i])]
            if kept:
                yield [part[i] for i in kept], batch.select(kept)

    def text_of(self, row: int) -> str | None:
        """The row's own text."""
        return self.manifest.text(row, self.text) if self.text in self.manifest.inputs else None

    def _source(self, row: int) -> Any:
        try:
            return self.manifest.source(self.modality, row)
        except DecodeError as error:  # the cell names what is not there
            self.faults.setdefault(row, f"{self.manifest.id(row)}: {self.modality}: {error}")
            return None


def _media(
    manifest: Manifest, modality: str, path: Path, references: Mapping[str, str]
) -> tuple[Callable[[int], Any], str | None]:
    """What a cell of a table at `path` says for a row of the manifest, and the reference that it is read by."""
    cells, beside = manifest.inputs[modality], path.resolve().parent
    base = manifest.path if manifest.path.is_dir() else manifest.path.parent
    if cells.keys is not None:
        other, _, column = references[modality].rpartition(":")
        keys = cells.keys
        return lambda row: cell(keys, row), f"{os.path.relpath(base / other, beside)}:{column}"
    own = manifest.path.is_file() and manifest.path.suffix.lower() != ".zip" and base.resolve() == beside
    held = np.flatnonzero(cells.codes > ABSENT)
    if own and len(held) and isinstance(cells[int(held[0])], str):
        return lambda row: cells[row], None
    if "id" not in manifest.table.columns:
        raise ManifestError(f"{manifest.path} has no column id to refer to its rows by: add one")
    return manifest.id, f"{os.path.relpath(manifest.path, beside)}:{cells.name}"
