"""Reading a table of rows: CSV with any separator, JSON lines or Parquet, from a file, a folder or a zip archive."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from mmformer.datasets.sources import Archive, Folder, Root, open_archive

Column = pa.Array | pa.ChunkedArray | list[Any]
"""The cells of one column; a list where Arrow cannot hold them, such as values of mixed types."""

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_SEPARATORS = ",;\t|"
_BLOCK = 1 << 30


class ManifestError(ValueError):
    """A manifest that cannot be used; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The columns of a manifest, and the root that its relative paths start from.

    `lines` are those that the rows stand on in the file, where each has one of its own (JSON lines).
    """

    name: str
    columns: Mapping[str, Column]
    num_rows: int
    root: Root
    notes: tuple[str, ...] = ()
    lines: tuple[int, ...] = ()


def cell(column: Column, index: int) -> Any:
    """One cell as a Python value; None where it is empty."""
    value = column[index]
    return _filled(value.as_py() if isinstance(value, pa.Scalar) else value)


def values(column: Column) -> list[Any]:
    """All cells as Python values; None where they are empty."""
    return [_filled(value) for value in (column if isinstance(column, list) else column.to_pylist())]


def as_column(cells: list[Any]) -> Column:
    """The cells in Arrow where it can hold them."""
    try:
        return pa.array(cells)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return cells


def _filled(value: Any) -> Any:
    """None for an empty cell; other tools write one as "" or as the float NaN."""
    return None if isinstance(value, str | float) and (value == "" or value != value) else value


def read_table(path: Path, columns: Sequence[str] | None = None, allow_outside: bool = False) -> Table:
    """Read a .csv, .tsv, .jsonl or .parquet file, or a folder or .zip holding one as `manifest.*` or the only one.

    `columns` limits what is read of a Parquet file to those that it has.

    Raises:
        ManifestError: no such file, no or several tables, a malformed or empty one.
    """
    if path.is_dir():
        table = path / _only_table([entry.name for entry in path.iterdir() if entry.is_file()], path)
        return _parse(table, _load(table), Folder(path, allow_outside), columns)
    if not path.is_file():
        raise ManifestError(f"{path}: no such file or folder")
    if path.suffix.lower() != ".zip":
        return _parse(path, _load(path), Folder(path.parent, allow_outside), columns)
    try:
        archive = open_archive(path)
        member = _only_table([name for name in archive.namelist() if "__MACOSX" not in name], path)
        data = archive.read(member)
    except BadZipFile as error:
        raise ManifestError(f"{path}: a damaged zip archive: {error}") from error
    folder = str(PurePosixPath(member).parent)
    return _parse(path / member, data, Archive(path, "" if folder == "." else folder), columns)


def _only_table(names: Sequence[str], where: Path) -> str:
    """The manifest among file names: the highest `manifest.*`, or else the only table."""
    tables = [name for name in names if name.lower().endswith(SUFFIXES)]
    named = sorted((n for n in tables if PurePosixPath(n).stem.lower() == "manifest"), key=lambda n: (n.count("/"), n))
    level = [name for name in named if name.count("/") == named[0].count("/")]
    found = level or tables
    if len(found) == 1:
        return found[0]
    have = f"has several tables ({', '.join(sorted(found)[:8])})" if found else "has no table"
    raise ManifestError(f"{where}: {have}: put one called manifest.csv (or .tsv, .jsonl, .parquet) in it")


def _load(path: Path) -> bytes | pa.Buffer:
    """The bytes of a file; those of a Parquet file stay on disk, as only some of its columns may be wanted."""
    if path.suffix.lower() == ".parquet" and path.stat().st_size:
        return pa.memory_map(str(path)).read_buffer()
    return path.read_bytes()


def _parse(path: Path, data: bytes | pa.Buffer, root: Root, columns: Sequence[str] | None) -> Table:
    suffix = path.suffix.lower()
    notes: tuple[str, ...] = ()
    lines: tuple[int, ...] = ()
    if suffix == ".parquet":
        found, num_rows = _parse_parquet(path, data, columns)
    elif suffix == ".jsonl":
        found, lines = _parse_jsonl(path, _decode(path, bytes(data)))
        num_rows = len(lines)
    elif suffix in SUFFIXES:
        found, num_rows, separator = _parse_csv(path, bytes(data))
        notes = (f"separator {separator!r}",)
    else:
        raise ManifestError(f"{path}: not a manifest: give one of {', '.join(SUFFIXES)}, a folder or a .zip")
    if not num_rows:
        raise ManifestError(f"{path}: no rows: it needs at least one below its header")
    return Table(name=path.name, columns=found, num_rows=num_rows, root=root, notes=notes, lines=lines)


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise ManifestError(f"{path}: line {line} is not UTF-8 (byte {byte:#x}): save it as UTF-8") from None


def _parse_csv(path: Path, data: bytes) -> tuple[dict[str, Column], int, str]:
    data = data.removeprefix(codecs.BOM_UTF8).lstrip(b"\r\n")
    text = _decode(path, data)
    separator, header = _separator(text)
    if not header:
        return {}, 0, separator
    named = [name.strip() for name in header]
    double = [name for name, count in Counter(named).items() if count > 1 and name]
    if double:
        raise ManifestError(f"{path}: several columns are called {double[0]!r}: rename all but one")
    # An odd number of quotes may mean an unclosed one, which would swallow the rows after it without a word.
    if data.count(b'"') % 2:
        _check_quotes(path, text, separator)
    names = [f"f{i}" for i in range(len(header))]
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(data),
            pyarrow.csv.ReadOptions(column_names=names, skip_rows_after_names=1, block_size=min(len(data) + 1, _BLOCK)),
            pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
            ),
        )
    except pa.ArrowInvalid as error:
        raise ManifestError(f"{path}: {error} (separator {separator!r}): quote cells that hold it") from error
    columns = {name: _whole(table.column(i)) for i, name in enumerate(named) if name}
    return columns, table.num_rows, separator


def _separator(text: str) -> tuple[str, list[str]]:
    """The separator that cuts the header into most columns, and the header; better one that cuts all rows alike."""
    best: tuple[tuple[bool, int], str, list[str]] | None = None
    start = text[: 1 << 16]
    for separator in _SEPARATORS:
        reader = csv.reader(io.StringIO(start, newline=""), delimiter=separator)
        rows = [row for row in islice(reader, 20) if row]
        if not rows:
            break
        whole = rows[:-1] if len(start) < len(text) and len(rows) > 1 else rows
        score = (all(len(row) == len(rows[0]) for row in whole) and len(rows[0]) > 1, len(rows[0]))
        if best is None or score > best[0]:
            best = (score, separator, rows[0])
    return (best[1], best[2]) if best else (",", [])


def _check_quotes(path: Path, text: str, separator: str) -> None:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    start = 1
    try:
        for _ in reader:
            start = reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(f"{path}: the row at line {start} has an unclosed or stray quote: {error}") from error


def _parse_jsonl(path: Path, text: str) -> tuple[dict[str, Column], tuple[int, ...]]:
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ManifestError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ManifestError(f"{path}: line {number} is a {type(row).__name__}: each line must be an object")
        rows[number] = row
    names = dict.fromkeys(name for row in rows.values() for name in row)
    return {name: as_column([row.get(name) for row in rows.values()]) for name in names}, tuple(rows)


def _parse_parquet(path: Path, data: bytes | pa.Buffer, columns: Sequence[str] | None) -> tuple[dict[str, Column], int]:
    try:
        file = pyarrow.parquet.ParquetFile(pa.BufferReader(data))
        names = file.schema_arrow.names
        table = file.read(columns=None if columns is None else [name for name in names if name in columns])
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{path}: a damaged Parquet file: {error}") from error
    return {name: _whole(table.column(name)) for name in table.column_names}, file.metadata.num_rows


def _whole(column: pa.ChunkedArray) -> Column:
    """One array of all chunks where they fit into one, as its cells are found fastest."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks() if column.nbytes < 1 << 30 else column
