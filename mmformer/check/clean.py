"""The rows that are whole, as a table of their own."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmformer.check.check import Checked
from mmformer.datasets.sources import Folder
from mmformer.datasets.tables import ManifestError, cell


def write_clean(checked: Checked, path: Path) -> int:
    """Write the rows without a broken cell, with all their columns, and return how many they are.

    Raises:
        ManifestError: another folder than that of the table, whose paths start there; or cells that the format cannot
            hold.
    """
    table = checked.manifest.table
    root = table.root
    if not isinstance(root, Folder):
        raise ManifestError(f"{checked.manifest.path} is an archive: unpack it, and clean the table in its folder")
    if path.resolve().parent != root.path.resolve():
        raise ManifestError(f"{path}: write it to {root.path}/, as the paths in it start there")
    rows = np.setdiff1d(np.arange(len(checked.manifest)), checked.broken_rows).tolist()
    temporary = path.with_name(f".{path.name}.tmp")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        columns = {name: column for name, column in table.columns.items()}
        pyarrow.parquet.write_table(pa.table(columns).take(rows), temporary)
    elif suffix in (".csv", ".tsv", ".jsonl"):
        with temporary.open("w", encoding="utf-8", newline="") as file:
            cells = ([cell(column, row) for column in table.columns.values()] for row in rows)
            _write(file, suffix, list(table.columns), cells, path)
    else:
        raise ManifestError(f"{path}: call it .csv, .tsv, .jsonl or .parquet")
    os.replace(temporary, path)
    return len(rows)


def _write(file: TextIO, suffix: str, names: Sequence[str], rows: Any, path: Path) -> None:
    try:
        if suffix == ".jsonl":
            for row in rows:
                held = {name: value for name, value in zip(names, row, strict=True) if value is not None}
                file.write(json.dumps(held, ensure_ascii=False) + "\n")
            return
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            if odd := next((value for value in row if isinstance(value, bytes | dict | list)), None):
                raise TypeError(f"a cell of {type(odd).__name__}")
            writer.writerow("" if value is None else value for value in row)
    except (TypeError, UnicodeEncodeError) as error:
        Path(file.name).unlink(missing_ok=True)
        raise ManifestError(f"{path} cannot hold {error}: call it .parquet or .jsonl") from error
