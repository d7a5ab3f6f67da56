"""What a report takes from the manifest that a run was trained on: its columns, its counts, its media."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmformer.datasets.conversations import read_conversations
from mmformer.datasets.manifest import ABSENT, Manifest, read_manifest
from mmformer.datasets.splits import SPLITS, TRAIN
from mmformer.report.show import Media

AUTO = "auto"


def places(manifest: Manifest) -> dict[str, int]:
    """The row of each id."""
    return {manifest.id(row): row for row in range(len(manifest))}


def manifest_rows(manifest: Manifest, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """For each id its text, what its cells of media say, and the manifest's other columns."""
    place = places(manifest)
    used = {cells.name for cells in manifest.inputs.values() if cells.keys is None}
    used |= {manifest.label.column} if manifest.label is not None else set()
    columns = {name: manifest.column(name) for name in manifest.table.columns if name not in used}
    out = {}
    for id in ids:
        row = place[id]
        said = {n: manifest.where(n, row) for n, c in manifest.inputs.items() if n != "text" and c.codes[row] != ABSENT}
        text = {"text": manifest.text(row)} if "text" in manifest.inputs else {}
        out[id] = {name: cells[row] for name, cells in columns.items()} | text | said
    return out


def manifest_media(manifest: Manifest) -> Media:
    """Reads the file of a cell wherever the manifest has it: in a folder, an archive or a cell."""
    place = places(manifest)

    def read(row: Mapping[str, Any], column: str) -> bytes | None:
        if column not in manifest.inputs:
            return None
        source = manifest.source(column, place[row["id"]])
        if source is None:
            return None
        with source.open() as stream:
            return stream.read()

    return read


def media_of(config: Mapping[str, Any]) -> Media | None:
    """The media of the manifest that a run's config names; None where it names none."""
    data = config.get("data") or {}
    if not data.get("path"):
        return None
    try:
        manifest = _manifest(data)
    except (OSError, ValueError) as error:
        reason = str(error)

        def gone(row: Mapping[str, Any], column: str) -> bytes | None:
            if row.get(column) is None:
                return None
            raise FileNotFoundError(reason)

        return gone
    return manifest_media(manifest)


def _manifest(data: Mapping[str, Any]) -> Manifest:
    """The rows that the `data` of a config name, with columns or with conversations."""
    allow = bool(data.get("allow_outside_root"))
    if "conversations" in (data.get("module") or {}):
        return read_conversations(data["path"], data.get("references"), allow_outside_root=allow).manifest
    given = data.get("columns") or {}
    columns = {role: name for role, name in given.items() if name != AUTO} | {"label": None, "split": None}
    return read_manifest(Path(data["path"]), columns, references=data.get("references"), allow_outside_root=allow)


def count_data(manifest: Manifest) -> dict[str, dict[str, int]]:
    """How many rows each split has of each combination of modalities (`"image+audio"`)."""
    names = list(manifest.inputs)
    present = np.stack([manifest.inputs[name].codes != ABSENT for name in names], 1)
    out = {}
    for code, split in enumerate(SPLITS):
        found = Counter(map(bytes, present[manifest.split == code]))
        named = {"+".join(n for n, has in zip(names, row, strict=True) if has): k for row, k in found.items()}
        if named:
            out[split] = named
    return out


def training_majority(manifest: Manifest) -> str | None:
    """The most frequent label of what trains; None unless a row has one label of several."""
    label = manifest.label
    if label is None or label.kind != "Classes":
        return None
    values = label.values[(manifest.split == TRAIN) & (label.values >= 0)]
    return label.names[int(np.bincount(values).argmax())] if len(values) else None
