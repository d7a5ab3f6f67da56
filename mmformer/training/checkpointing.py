"""Checkpoints that are whole or absent, whatever happens while one is written, and callbacks that write them."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning_fabric.plugins import CheckpointIO

from mmformer.checkpoints.frozen import put_back, set_apart

SUMS = "SHA256SUMS"
"""File beside the checkpoints: the hash of every version that was written, in the format of sha256sum."""

_VERSIONS = 3
"""Hashes kept for one name: that of the file, of the one it replaces, and of `previous.ckpt`."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or is damaged."""


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        written = self._file.write(view)
        if written != view.nbytes:
            raise OSError(f"only {written} of {view.nbytes} bytes were written")
        self._hash.update(view)
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # a folder cannot be opened there; the rename is journaled
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(
    path: Path, write: Callable[[Any], None], before_publishing: Callable[[str], None] | None = None
) -> str:
    """Write a file so that its name always holds either the old content or all of the new; gives back its sha256.

    The temporary file lies in the same folder, so that `os.replace` never copies. `before_publishing` is called with
    the hash when the new content is safe on disk but not yet visible.

    Raises:
        CheckpointError: disk full, no permission, a failing disk; the temporary file is removed, the old one intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            hashing = _Hashing(file)
            write(hashing)
            file.flush()
            os.fsync(file.fileno())
        if before_publishing is not None:
            before_publishing(hashing.digest)
        os.replace(temporary, path)
        _sync_folder(path.parent)
        return hashing.digest
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        raise _unwritten(path, temporary, error) from error


def _unwritten(path: Path, temporary: Path, error: Exception) -> CheckpointError:
    """What to say of a file that could not be written; what there is of it is removed."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free / 1e6 if path.parent.is_dir() else 0
    kept = f"the earlier {path.name} is intact" if path.exists() else f"there is no earlier {path.name}"
    return CheckpointError(f"could not write {path} ({error}; {free:.0f} MB free): {kept}")


def read_sums(folder: Path) -> list[tuple[str, str]]:
    """(hash, name) of every version written to a folder, the oldest first."""
    path = folder / SUMS
    lines = path.read_text().splitlines() if path.is_file() else []
    return [(line[:64], line[66:]) for line in lines if len(line) > 66]


def _add_sum(folder: Path, name: str, digest: str) -> None:
    lines = [*read_sums(folder), (digest, name)]
    of_name = [line for line in lines if line[1] == name][-_VERSIONS:]
    kept = [line for line in lines if line[1] != name] + of_name
    text = "".join(f"{digest}  {name}\n" for digest, name in kept)
    write_whole(folder / SUMS, lambda file: file.write(text.encode()))


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_whole(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, after comparing it with the hash that was recorded when it was written.

    Frozen weights, which lie in a file beside it, are put in their places. A folder without recorded hashes (a
    checkpoint from elsewhere) is read as it is. Only tensors and plain containers are ever unpickled.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, or not a checkpoint, or one that holds more than plain containers.
        FrozenError: the frozen weights are not beside it, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    known = {digest for digest, _ in read_sums(path.parent)}
    if known and (found := sha256(path)) not in known:
        raise CheckpointError(f"{path} is damaged: its sha256 {found[:12]}... is none of those in {SUMS}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint of plain containers: {reason}") from error
    return put_back(checkpoint, path, map_location)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's way to the disk: atomic, hashed, never unpickling code, and writing frozen weights only once."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        checkpoint, file, frozen = set_apart(checkpoint, path.parent)
        if file is not None and not file.is_file():
            write_whole(file, lambda handle: torch.save(frozen, handle))
        # The hash is recorded before the name changes hands: a kill between the two leaves an old file of known hash.
        write_whole(path, lambda file: torch.save(checkpoint, file), lambda sum: _add_sum(path.parent, path.name, sum))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load_whole(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def clean(folder: Path) -> list[Path]:
    """Remove the temporary files that a killed process left in a checkpoint folder."""
    left = sorted(folder.glob(".*.tmp")) if folder.is_dir() else []
    for path in left:
        path.unlink(missing_ok=True)
    return left


def newest_whole(folder: Path, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> Path | None:
    """`last.ckpt`, or the newest other checkpoint where that is damaged or absent; a damaged one becomes .bad."""
    found = sorted(folder.glob("*.ckpt"), key=lambda p: (p.name == "last.ckpt", p.stat().st_mtime_ns), reverse=True)
    for index, path in enumerate(found):
        try:
            load_whole(path)
            return path
        except CheckpointError as error:
            bad = path.with_suffix(".ckpt.bad")
            os.replace(path, bad)
            rest = f"going on from {found[index + 1].name}" if index + 1 < len(found) else "no other one is left"
            say(f"!! {error}; set aside as {bad.name}, {rest}")
    return None


def keep_previous(path: Path) -> None:
    """Let `previous.ckpt` name what `path` holds now, without a moment in which `path` is absent.

    Raises:
        CheckpointError: disk full, no permission, a failing disk; both files are intact.
    """
    if not path.is_file():
        return
    previous, temporary = path.with_name("previous.ckpt"), path.with_name(".previous.ckpt.tmp")
    try:
        # After a kill before the next save both are one file already, and renaming one to the other would do nothing.
        if previous.exists() and previous.samefile(path):
            return
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a filesystem without hard links
            shutil.copyfile(path, temporary)
        os.replace(temporary, previous)
    except OSError as error:
        raise _unwritten(previous, temporary, error) from error
