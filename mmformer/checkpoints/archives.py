"""Zip archives of torch: their members checked before anything is read, TorchScript's tensors without its code.

OpenAI's CLIP files are TorchScript. `torch.jit.load` would compile the code in them; here only `data.pkl` is walked,
by an unpickler that knows tensors and plain containers and turns every object into a bag of its attributes.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from mmformer.checkpoints.store import RefusedFile

CODE_LIMIT = 512_000_000
"""Bytes that the compressed members of an archive may unpack to."""

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def check_archive(path: Path) -> None:
    """Compare an archive with what torch writes: one folder, plain names, no name twice, tensors not compressed.

    Raises:
        RefusedFile: it is otherwise; torch itself would not extract anything, but another program might.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise RefusedFile(f"{path} is damaged: {error}") from error
    names = [member.orig_filename for member in members]
    for member, name in zip(members, names, strict=True):
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or "\\" in name or name[1:2] == ":":
            raise RefusedFile(f"{path} holds the member {name!r}, which points out of it: refused")
        if (member.external_attr >> 16) & 0o170000 == 0o120000:
            raise RefusedFile(f"{path} holds the link {name!r}: refused")
        if "data" in place.parts[1:-1] and member.compress_type != zipfile.ZIP_STORED:
            raise RefusedFile(f"{path} holds the compressed tensor {name!r}, which torch never writes: refused")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RefusedFile(f"{path} holds {twice!r} twice: refused")
    unpacked = sum(member.file_size for member in members if member.compress_type != zipfile.ZIP_STORED)
    if unpacked > CODE_LIMIT:
        raise RefusedFile(f"{path} would unpack to {unpacked} bytes: refused")


def is_scripted(path: Path) -> bool:
    """Whether an archive is TorchScript, which holds code beside its tensors."""
    with zipfile.ZipFile(path) as archive:
        return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())


def scripted_tensors(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive, mapped from the file; its code is not looked at.

    Raises:
        RefusedFile: its pickle asks for anything but tensors, plain containers and bags of attributes.
    """
    with zipfile.ZipFile(path) as archive:
        found = [name for name in archive.namelist() if PurePosixPath(name).name == "data.pkl"]
        if len(found) != 1:
            raise RefusedFile(f"{path} is TorchScript with {len(found)} data.pkl: refused")
        storages = _Storages(path, archive, found[0].removesuffix("data.pkl"))
        with archive.open(found[0]) as file:
            try:
                root = _TensorUnpickler(file, storages).load()
            except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
                raise RefusedFile(f"{path} is no plain TorchScript: {error}: refused") from error
            except Exception as error:  # whatever a damaged pickle leads the unpickler into
                raise RefusedFile(f"{path} is damaged: {error!r}") from error
    if not isinstance(root, Bag):
        raise RefusedFile(f"{path} is TorchScript of {type(root).__name__}, not of a module")
    return dict(_walk(root, ""))


class Bag:
    """An object of a class that TorchScript code defines: its attributes, nothing else."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"an object with the state {type(state).__name__}")
        self.__dict__.update(state)


class _Storages:
    """The numbers in an archive, mapped rather than read."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str):
        self.path, self.archive, self.root = path, archive, root
        self.bytes = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def flat(self, key: str, dtype: torch.dtype, numel: int) -> Tensor:
        """The member `data/<key>` as one row of numbers."""
        member = self.archive.getinfo(f"{self.root}data/{key}")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != numel * dtype.itemsize:
            raise pickle.UnpicklingError(f"{numel} numbers of {dtype} in the {member.file_size} bytes of data/{key}")
        with self.path.open("rb") as file:
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
        begin = member.header_offset + 30 + name + extra
        if begin + member.file_size > len(self.bytes):
            raise pickle.UnpicklingError(f"data/{key} ends past the file")
        row = self.bytes[begin : begin + member.file_size]
        aligned = begin % dtype.itemsize == 0
        return (row if aligned else row.clone()).view(dtype)


class _TensorUnpickler(pickle.Unpickler):
    """Knows tensors, plain containers and bags; every other name is refused before anything is called."""

    def __init__(self, file: Any, storages: _Storages):
        super().__init__(file)
        self.storages = storages

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """What a name of the pickle stands for."""
        if module_name == "__torch__" or module_name.startswith("__torch__."):
            return Bag
        if module_name == "torch" and global_name in STORAGES:
            return STORAGES[global_name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("torch.jit._pickle", "restore_type_tag"): _untagged,
            ("collections", "OrderedDict"): OrderedDict,
        } | {("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")}
        if (module_name, global_name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return known[module_name, global_name]

    def persistent_load(self, pid: Any, /) -> Tensor:
        """The numbers that a tensor of the pickle refers to."""
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(numel, int):
            raise pickle.UnpicklingError(f"it refers to {kind!r}")
        return self.storages.flat(str(key), dtype, numel)


def _rebuild(row: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    reach = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and reach >= len(row)):
        raise pickle.UnpicklingError(f"a tensor of {size} reaches past its {len(row)} numbers")
    return row.as_strided(size, stride, row.storage_offset() + offset)


def _rebuild_parameter(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


def _untagged(value: Any, *_: Any) -> Any:
    return value


def _walk(bag: Bag, prefix: str, above: tuple[Bag, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(bag).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Bag) and value not in (*above, bag):
            yield from _walk(value, f"{prefix}{name}.", (*above, bag))
