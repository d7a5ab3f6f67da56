"""A manifest: the rows of a data set, which files each has, its label and its split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from mmformer.datasets.integrity import CheckedSource, key, read_checksums, sidecar
from mmformer.datasets.labels import MISSING_CLASS, Kind, Target, read_target
from mmformer.datasets.sources import BytesSource, DecodeError, Root, Source
from mmformer.datasets.splits import SPLITS, TRAIN, split_by_fold, split_by_hash, split_by_name
from mmformer.datasets.tables import Column, ManifestError, Table, as_column, cell, read_table, values

MODALITIES = ("text", "image", "audio")
_ROLES = ("id", "split", "label")
_STANDARD = (*_ROLES, *MODALITIES)
_OFTEN_CALLED = {
    "image": "img picture photo path file filename filepath image_path image_file",
    "text": "caption sentence question title description prompt transcript",
    "audio": "sound wav speech recording clip voice audio_path audio_file",
    "label": "class category target answer y",
}

ABSENT = -1
"""The code of a cell that is empty."""
_DANGLING = -2


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """The cells of one modality: texts, paths from `root`, or bytes.

    `pick[i]` is the row of `column` that row i has: ABSENT where it has none. Without `pick`, row i has row i.
    `keys` are the cells that a reference was looked up by.
    """

    name: str
    column: Column
    root: Root
    pick: Int[np.ndarray, " N"] | None = None
    keys: Column | None = None
    table: str = ""

    def __getitem__(self, index: int) -> Any:
        if self.pick is None or self.keys is None:
            return cell(self.column, index)
        row = int(self.pick[index])
        if row == ABSENT:
            return None
        key = cell(self.keys, index)
        if row == _DANGLING:
            raise DecodeError(f"{self.table} has no row {key!r}")
        value = cell(self.column, row)
        if value is None:
            raise DecodeError(f"row {key!r} of {self.table} has no {self.name!r}")
        return value

    @cached_property
    def codes(self) -> Int[np.ndarray, " N"]:
        """A number for each row that equal cells share: ABSENT where it is empty, lower where it cannot be found."""
        if self.pick is not None:
            return self.pick
        if isinstance(self.column, list):
            seen: dict[str, int] = {}
            keys = [None if value is None else repr(value) for value in values(self.column)]
            return np.array([ABSENT if k is None else seen.setdefault(k, len(seen)) for k in keys], dtype=np.int64)
        if not pa.types.is_string(self.column.type):
            filled = self.column.is_valid().to_numpy(zero_copy_only=False)
            return np.where(filled, np.arange(len(filled)), ABSENT)
        column = self.column.combine_chunks() if isinstance(self.column, pa.ChunkedArray) else self.column
        encoded = column.dictionary_encode()
        codes = encoded.indices.fill_null(ABSENT).to_numpy(zero_copy_only=False).astype(np.int64)
        empty = encoded.dictionary.index("").as_py()
        return codes if empty == ABSENT else np.where(codes == empty, ABSENT, codes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """The rows of a data set. Nothing is decoded, and a cell becomes a Python value only when it is asked for.

    `inputs` holds the cells of each modality, `split` the split of each row as an index into SPLITS. `notes` say what
    was inferred, for the user to check. With `checksums`, the sha256 of each file by its name in `sums`, every source
    compares what it reads.
    """

    path: Path
    table: Table
    ids: Column
    split: Int[np.ndarray, " N"]
    inputs: Mapping[str, Cells]
    label: Target | None = None
    notes: tuple[str, ...] = ()
    checksums: Mapping[str, str] | None = None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    @property
    def kind(self) -> Kind | None:
        return self.label.kind if self.label else None

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.label.names if self.label else ()

    def id(self, index: int) -> str:
        """The id of a row."""
        return str(cell(self.ids, index))

    def rows(self, split: str | None) -> Int[np.ndarray, " n"]:
        """The rows of a split, in order; of all for None.

        Raises:
            ManifestError: the split is empty or there is no such split.
        """
        if split is None:
            return np.arange(len(self))
        if split not in SPLITS:
            raise ManifestError(f"no split {split!r}: the splits are {', '.join(SPLITS)}")
        found = np.flatnonzero(self.split == SPLITS.index(split))
        if not len(found):
            counts = ", ".join(f"{name} {int((self.split == i).sum())}" for i, name in enumerate(SPLITS))
            raise ManifestError(f"{self.path}: split {split!r} has no row ({counts}): check its split column")
        return found

    @property
    def sums(self) -> Path:
        """Where the checksums of the files are kept."""
        return sidecar(self.path, self.table.name)

    def source(self, modality: str, index: int) -> Source | None:
        """Where the bytes of a cell are; None where it is empty.

        Raises:
            DecodeError: the cell names a row that is not there, or a file that is outside the manifest's root.
        """
        found = self._source(modality, index)
        if found is None or self.checksums is None:
            return found
        return CheckedSource(found, self.checksums.get(key(found, self.sums)))

    def _source(self, modality: str, index: int) -> Source | None:
        cells = self.inputs[modality]
        value = cells[index]
        held = value
        if isinstance(value, dict):
            held = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(held, bytes):
            return BytesSource(held, self.where(modality, index))
        if held is None and value is None:
            return None
        if not isinstance(held, str):
            raise DecodeError(f"{type(held).__name__} in place of a path or bytes")
        return cells.root.source(held.strip())

    def text(self, index: int, modality: str = "text") -> str | None:
        """The text of a cell; None where there is none but white space."""
        value = self.inputs[modality][index]
        return None if value is None or not str(value).strip() else str(value)

    def where(self, modality: str, index: int) -> str:
        """What a cell says, or for bytes which cell it is, for messages."""
        cells = self.inputs[modality]
        value = cell(cells.column if cells.keys is None else cells.keys, index)
        shown = value.get("path") if isinstance(value, dict) else value
        if isinstance(shown, str):
            return f"{cells.table}:{shown}" if cells.table else shown
        return f"{self.table.name}, row {self.id(index)!r}, {cells.name}"

    def target(self, index: int) -> Any:
        """The label of a row: a class index, a 0-1 vector or a number."""
        if self.label is None:
            raise ManifestError(self._lacks("label"))
        return self.label.rows(np.array([index]))[0].tolist()

    def column(self, name: str) -> list[Any]:
        """The cells of any column, None where empty."""
        if name not in self.table.columns:
            raise ManifestError(f"{self.path} has no column {name!r}; it has {', '.join(self.table.columns)}")
        return values(self.table.columns[name])

    def read_target(self, column: str, kind: Kind | None = None, names: Sequence[str] | None = None) -> Target:
        """Read another column as a target."""
        cells = self.column(column)
        return read_target(column, cells, values(self.ids), kind=kind, names=names, train=self.split == TRAIN)

    def require(self, *roles: str) -> Manifest:
        """This manifest, if it has all of these modalities, and a label where `label` is among them.

        Raises:
            ManifestError: one is missing; the message lists the columns and what to write.
        """
        for role in roles:
            if (self.label is None) if role == "label" else role not in self.inputs:
                raise ManifestError(self._lacks(role))
        return self

    def _lacks(self, role: str) -> str:
        return f"{self.path}: {_lacks(self.table, role)}"


def read_manifest(
    path: str | Path,
    columns: Mapping[str, str | None] | None = None,
    *,
    references: Mapping[str, str | None] | None = None,
    fold: int | None = None,
    kind: Kind | None = None,
    label_names: Sequence[str] | None = None,
    split_seed: int = 0,
    allow_outside_root: bool = False,
    checksums: bool = False,
) -> Manifest:
    """Read a .csv, .tsv, .jsonl or .parquet table, or a folder or .zip that holds one beside its files.

    `columns` maps what a column is for (id, split, text, image, audio, label or a further modality) to its name, or to
    None where it is not to be used; a column that is called so needs no entry, and an entry of the same name is none.
    `references` maps a modality to `other.csv:column`, a column of another manifest (from this one's folder): the
    cells are ids of its rows. With a `fold`, the split column (or else one called `fold`) holds folds, of which that
    one tests and the next validates. `kind` and `label_names` fix what the labels are, which is inferred without.
    With `checksums`, every file is compared with its sha256 in the file that `mmformer data check --checksums` wrote.

    Raises:
        ManifestError: no such file or column, double ids, a split or label that is none; it says what to write.
    """
    path = Path(path)
    table = read_table(path, allow_outside=allow_outside_root)
    wanted = {role: name for role, name in (columns or {}).items() if role != name or role not in _STANDARD}
    if fold is not None and "split" not in wanted and "fold" in table.columns:
        wanted["split"] = "fold"
    used = _columns(path, table, wanted)
    referred = {role: other for role, other in (references or {}).items() if other is not None}
    if unmatched := set(referred) - set(used):
        raise ManifestError(f"{path}: {_lacks(table, min(unmatched))}")
    inputs = {
        role: refer(path, name, table, referred[role], allow_outside_root)
        if role in referred
        else Cells(name=name, column=table.columns[name], root=table.root)
        for role, name in used.items()
        if role not in _ROLES
    }
    # A column that is merely called so may be empty, as in a template; one that was asked for is kept.
    inputs = {role: cells for role, cells in inputs.items() if wanted.get(role) or (cells.codes != ABSENT).any()}
    if not inputs:
        raise ManifestError(f"{path}: {_lacks(table, '')}")
    ids = _ids(path, table, used.get("id"))
    split, split_note = _split(table, used, ids, fold, split_seed)
    label, notes = None, [*table.notes, split_note]
    cells = table.columns[used["label"]] if "label" in used else []
    if wanted.get("label") or any(value is not None for value in values(cells)):
        label = read_target(used["label"], cells, ids, kind=kind, names=label_names, train=split == TRAIN)
        notes += _label_notes(label, split)
    held = [*(used[role] for role in used if role in inputs or role in ("id", "split")), label.column if label else ""]
    unused = [name for name in table.columns if name not in held]
    notes += [f"columns not used: {', '.join(unused)}"] if unused else []
    manifest = Manifest(
        path=path, table=table, ids=as_column(ids), split=split, inputs=inputs, label=label, notes=tuple(notes)
    )
    return replace(manifest, checksums=read_checksums(manifest.sums)) if checksums else manifest


def _columns(path: Path, table: Table, wanted: Mapping[str, str | None]) -> dict[str, str]:
    """The column of each role: as mapped, or the one that is called so."""
    for role, name in wanted.items():
        if name is not None and name not in table.columns:
            raise ManifestError(f"{path} has no column {name!r} (data.columns.{role}={name}): {_lacks(table, role)}")
    found = {role: wanted.get(role, role) for role in _STANDARD if role in wanted or role in table.columns}
    return {role: name for role, name in (found | dict(wanted)).items() if name is not None}


def _lacks(table: Table, role: str) -> str:
    """What to write when there is no column for a role (or for any modality, when it is empty)."""
    have = ", ".join(table.columns)
    lines = []
    for missing in [role] if role else MODALITIES:
        names = [missing, *_OFTEN_CALLED.get(missing, "").split()]
        likely = [name for name in table.columns if name.lower() in names]
        lines.append(f"data.columns.{missing}={likely[0] if likely else '<column>'}")
    what = f"no column for {role!r}" if role else "no column called text, image or audio with anything in it"
    return f"{what}; it has {have} ({', '.join(table.notes) or 'names as in the file'}); write {' or '.join(lines)}"


def _ids(path: Path, table: Table, name: str | None) -> list[str]:
    if name is None:
        return [str(i) for i in range(table.num_rows)]
    raw = values(table.columns[name])
    ids = [str(value) for value in raw]
    empty = [i for i, value in enumerate(raw) if value is None]
    if empty:
        raise ManifestError(f"{path}: {len(empty)} rows have no id, such as row {empty[0] + 1}: fill them in")
    if len(set(ids)) < len(ids):
        double = [name for name, count in Counter(ids).items() if count > 1]
        some = ", ".join(map(repr, double[:5])) + (", ..." if len(double) > 5 else "")
        raise ManifestError(
            f"{path}: {len(double)} ids stand in several rows: {some}: make them differ, or set data.columns.id=null"
        )
    return ids


def _split(
    table: Table, used: Mapping[str, str], ids: Sequence[str], fold: int | None, seed: int
) -> tuple[Int[np.ndarray, " N"], str]:
    """The split of each row, and by what rule."""
    if "split" in used:
        name, cells = used["split"], values(table.columns[used["split"]])
        if fold is None:
            return split_by_name(name, cells, ids, seed), f"split by column {name!r}"
        return split_by_fold(name, cells, fold), f"split by column {name!r}: fold {fold} tests, the next validates"
    if fold is not None:
        raise ManifestError(f"data.fold={fold}, but {_lacks(table, 'split')}")
    if "id" in used:
        return split_by_hash(ids, seed), "split 80/10/10 by a hash of the id"
    # Without ids the content decides, so that equal rows stand in one split and the order plays no part.
    columns = [values(table.columns[name]) for name in used.values()]
    keys = [hashlib.blake2b(repr(row).encode(), digest_size=16).hexdigest() for row in zip(*columns, strict=True)]
    return split_by_hash(keys, seed), "split 80/10/10 by a hash of the row, as there are no ids"


def refer(path: Path, name: str, table: Table, reference: str, allow_outside: bool) -> Cells:
    """The cells of another manifest's column that the ids in this one's point to."""
    other_path, _, column = reference.rpartition(":")
    if not other_path:
        raise ManifestError(f"reference {reference!r}: write it as other.csv:column")
    base = path if path.is_dir() else path.parent
    other = read_table(base / other_path, columns=["id", column], allow_outside=allow_outside)
    for needed in ("id", column):
        if needed not in other.columns:
            raise ManifestError(f"{base / other_path} has no column {needed!r}; it has {', '.join(other.columns)}")
    place = {key: row for row, key in enumerate(_ids(base / other_path, other, "id"))}
    keys = [None if value is None else str(value) for value in values(table.columns[name])]
    pick = np.array([ABSENT if key is None else place.get(key, _DANGLING) for key in keys], dtype=np.int64)
    return Cells(
        name=column, column=other.columns[column], root=other.root, pick=pick, keys=as_column(keys), table=other_path
    )


def _label_notes(label: Target, split: np.ndarray) -> list[str]:
    """What the labels were taken for, and which classes no row trains."""
    count = f"{len(label.names)} classes" if label.names else f"a number of mean {label.mean:.3g}"
    many = ", several a row" if label.kind == "Labels" else ""
    notes = [f"label {label.column!r}: {count}{many}, in {int(label.present.sum())} of {len(split)} rows"]
    if label.names:
        seen = label.values
        of_row = split if label.offsets is None else np.repeat(split, np.diff(label.offsets))
        unseen = sorted(set(seen[of_row != TRAIN].tolist()) - set(seen[of_row == TRAIN].tolist()) - {MISSING_CLASS})
        if unseen:
            notes.append(f"labels that no row trains: {', '.join(label.names[i] for i in unseen[:10])}")
    return notes
