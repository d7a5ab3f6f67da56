"""Files of weights, told apart by what is in them, and read without running anything of theirs."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmformer.checkpoints.archives import check_archive, is_scripted, scripted_tensors
from mmformer.checkpoints.frozen import put_back
from mmformer.checkpoints.store import Entry, RefusedFile, TensorStore

HEADER_LIMIT = 100_000_000
"""Bytes of a safetensors header, the limit of its own library."""

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "weights")
"""Keys under which training programs keep the weights: Lightning and open_clip; ALBEF, BLIP and LAVIS; others."""


class Weights(NamedTuple):
    """The tensors of a file and the plain values saved beside them."""

    tensors: TensorStore
    extra: dict[str, Any]


def read_weights(path: Path) -> Weights:
    """The weights of one file, or of the shards that an index names; nothing but shapes is read yet.

    Raises:
        RefusedFile: damaged, of no known format, or one that asks to run code.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        check_archive(path)
        if is_scripted(path):
            return Weights(TensorStore.of(scripted_tensors(path)), {})
        return _unpickle(path, mmap=True)
    if start[:1] == b"\x80":  # a pickle, as torch wrote it before 1.6
        return _unpickle(path, mmap=False)
    raise RefusedFile(f"{path} is no file of weights: it is neither safetensors nor one that torch.save wrote")


def _read_safetensors(path: Path) -> Weights:
    entries, metadata = _header(path)
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise RefusedFile(f"{path} is no valid safetensors file: {error}") from error
    tensors = {
        name: Entry(shape, dtype, lambda name=name: file.get_tensor(name)) for name, (shape, dtype) in entries.items()
    }
    return Weights(TensorStore(tensors), metadata)


def _header(path: Path) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], dict[str, Any]]:
    """Shapes and types by name, after checking that the tensors cover the file exactly and once."""

    def refuse(why: str) -> RefusedFile:
        return RefusedFile(f"{path} is no valid safetensors file: {why}. Nothing of it was read: get it again")

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > HEADER_LIMIT or 8 + length > size:
            raise refuse(f"its header claims {length} bytes; the file has {size}, and {HEADER_LIMIT} are the limit")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}, no object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not texts by name")
        spans = [(name, *_tensor(name, entry)) for name, entry in header.items()]
    except (ValueError, RecursionError) as error:
        raise refuse(str(error)) from error
    place = 0
    for name, _, _, (begin, end) in sorted(spans, key=lambda span: span[3]):
        if begin != place:
            raise refuse(f"tensor {name!r} starts at {begin}, {'inside another' if begin < place else 'after a hole'}")
        place = end
    if 8 + length + place != size:
        raise refuse(f"its tensors end at {8 + length + place}, the file at {size}")
    return {name: (shape, dtype) for name, shape, dtype, _ in spans}, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _tensor(name: str, entry: Any) -> tuple[tuple[int, ...], torch.dtype, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if entry["dtype"] not in TYPES or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"tensor {name!r} has dtype {entry['dtype']!r}, shape {shape!r} and offsets {offsets!r}")
    dtype, (begin, end) = TYPES[entry["dtype"]], offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"tensor {name!r} is {shape} of {entry['dtype']}, but has {end - begin} bytes")
    return tuple(shape), dtype, (begin, end)


def _read_shards(index: Path) -> Weights:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_once)["weight_map"]
        places = {str(name): str(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedFile(f"{index} is no index of shards: {error!r}") from error
    entries: dict[str, Entry] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise RefusedFile(f"{index} names {file!r}, which does not lie beside it: refused")
        path = index.with_name(file)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, and {index.name} names it: copy all shards")
        found = read_weights(path).tensors.entries
        wanted = {name for name, place in places.items() if place == file}
        if wanted != set(found):
            apart = ", ".join(sorted(wanted ^ set(found))[:5])
            raise RefusedFile(f"{path} does not hold what {index.name} says, see {apart}: copy all shards again")
        entries |= found
    return Weights(TensorStore(entries), {})


def _unpickle(path: Path, mmap: bool) -> Weights:
    """What torch.save wrote, through torch's unpickler of tensors and plain containers, never through another."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise RefusedFile(
            f"{path} holds more than tensors and plain values, and to read that could run code: refused. Its author "
            f"can save it as safetensors. ({_first_of(error, 'GLOBAL', 'Unsupported')})"
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RefusedFile(f"{path} is damaged: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if isinstance(content, dict):  # a run's frozen weights lie beside its checkpoint
        content = put_back(content, path)
    return _weights_in(content, path)


def _first_of(error: Exception, *words: str) -> str:
    """The line of torch's long message that names the culprit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if any(word in line for word in words)), lines[0] if lines else repr(error))


def _weights_in(content: Any, path: Path) -> Weights:
    extra: dict[str, Any] = {}
    while isinstance(content, Mapping) and (key := _wrapper(content)):
        extra |= {str(name): value for name, value in content.items() if name != key}
        content = content[key]
    if not isinstance(content, Mapping):
        raise RefusedFile(f"{path} holds {type(content).__name__}, not tensors by name: save the state_dict")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise RefusedFile(f"{path} holds no tensors by name, its keys are {', '.join(map(str, content))[:200]}")
    extra |= {str(name): value for name, value in content.items() if not isinstance(value, Tensor)}
    return Weights(TensorStore.of(tensors), extra)


def _wrapper(content: Mapping[Any, Any]) -> str | None:
    """The key under which the weights lie, where the mapping is not the weights themselves."""
    return next((key for key in WRAPPERS if isinstance(content.get(key), Mapping) and content[key]), None)
