"""An index as a folder: parts that are named by what they hold and never change, and a manifest that lists them.

`manifest.json` is written last and replaced at once, so that whoever reads sees the old index or the new one, whenever
the writer is stopped. Vectors are safetensors, rows are Parquet: no file of it can run code. One writer at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmformer.search.index import Index, Part
from mmformer.search.inverted import Inverted

MANIFEST = "manifest.json"
FORMAT = 1
_VECTORS, _ROWS, _LISTS = ".vectors.safetensors", ".rows.parquet", ".lists.safetensors"


def save(index: Index, folder: Path) -> Path:
    """Write an index, and delete what files of an earlier one it does without."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_write_part(part, folder) for part in index.parts]
    lists = None if index.inverted is None else _write_lists(index.inverted, folder)
    manifest = {
        "format": FORMAT,
        "model": index.model,
        "origin": os.path.relpath(index.origin, folder) if index.origin else "",
        "dim": index.dim,
        "parts": [{"name": part.name, "rows": len(part.vectors)} for part in parts],
        "lists": lists,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    _replace(folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))
    used = {part.name + end for part in parts for end in (_VECTORS, _ROWS)} | {f"{lists}{_LISTS}"}
    for path in folder.iterdir():
        if path.name.endswith((_VECTORS, _ROWS, _LISTS)) and path.name not in used:
            path.unlink()
    return folder


def load(folder: Path) -> Index:
    """Read an index."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no index: it has no {MANIFEST}; make one with `mmformer index`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, model, dim = int(manifest["format"]), str(manifest["model"]), int(manifest["dim"])
        names = [(str(part["name"]), int(part["rows"])) for part in manifest["parts"]]
        lists, origin = manifest["lists"], str(manifest["origin"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}: build the index again") from error
    if version > FORMAT:
        raise ValueError(f"{path} has format {version}, this version reads up to {FORMAT}: install a newer mmformer")
    for name in [name for name, _ in names] + ([lists] if lists else []):
        if not str(name).isalnum():
            raise ValueError(f"{path} names the file {name!r}: a part is named by letters and digits only")
    parts = tuple(_read_part(folder, name, (count, dim)) for name, count in names)
    index = Index(model=model, parts=parts, origin=os.path.normpath(folder / origin) if origin else "")
    if not lists:
        return index
    inverted = Inverted.of(_read_tensors(folder / f"{lists}{_LISTS}"))
    if inverted.count > len(index):
        raise ValueError(f"{path}: lists of {inverted.count} rows for an index of {len(index)}: build the index again")
    return replace(index, inverted=inverted)


def _write_part(part: Part, folder: Path) -> Part:
    name = part.name or _digest(part)
    vectors, rows = folder / f"{name}{_VECTORS}", folder / f"{name}{_ROWS}"
    if not vectors.is_file():
        _replace(vectors, lambda path: save_file({"vectors": part.vectors.contiguous()}, path))
    if not rows.is_file():
        _replace(rows, lambda path: pq.write_table(part.rows, path))
    return replace(part, name=name)


def _write_lists(inverted: Inverted, folder: Path) -> str:
    tensors = inverted.tensors()
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.numpy().data)
    name = digest.hexdigest()[:32]
    if not (folder / f"{name}{_LISTS}").is_file():
        _replace(folder / f"{name}{_LISTS}", lambda path: save_file(tensors, path))
    return name


def _read_part(folder: Path, name: str, shape: tuple[int, int]) -> Part:
    vectors = _read_tensors(folder / f"{name}{_VECTORS}").get("vectors")
    path = folder / f"{name}{_ROWS}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the whole folder, or build the index again")
    try:
        rows = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged: {error}: build the index again") from error
    if vectors is None or tuple(vectors.shape) != shape or rows.num_rows != shape[0]:
        held = None if vectors is None else tuple(vectors.shape)
        raise ValueError(f"part {name} has vectors {held} and {rows.num_rows} rows, the manifest says {shape}")
    return Part(vectors=vectors, rows=rows, name=name)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the whole folder, or build the index again")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}: build the index again") from error


def _digest(part: Part) -> str:
    digest = hashlib.sha256(part.vectors.contiguous().view(torch.uint8).numpy().data)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, part.rows.schema) as writer:
        writer.write_table(part.rows)
    digest.update(sink.getvalue())
    return digest.hexdigest()[:32]


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, and move it there once it lies on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
