"""Where the bytes of one picture or sound are: a file, a member of an archive, or a cell of a table."""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from posixpath import normpath
from typing import Protocol, runtime_checkable

MAX_FILE_BYTES = 1 << 30
"""A larger file is refused before a byte of it is read."""

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://|(?:file|pipe|data|https?):", re.IGNORECASE)


Stream = io.BufferedReader | io.BytesIO


class DecodeError(ValueError):
    """One picture, sound or text that cannot be used; the message is the reason."""


@runtime_checkable
class Source(Protocol):
    """Bytes that have a name for error messages."""

    @property
    def name(self) -> str: ...

    def open(self) -> Stream:
        """A fresh seekable stream of the bytes. Raises DecodeError when there are none."""
        ...


@runtime_checkable
class Root(Protocol):
    """What relative paths start from: a folder, or a folder inside an archive."""

    def source(self, path: str) -> Source:
        """The file of that relative path. Raises DecodeError for a path that leaves the root."""
        ...


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file on disk."""

    path: Path
    name: str

    def open(self) -> Stream:
        try:
            info = os.stat(self.path)
            # Opening a named pipe or a device would wait for ever.
            if not stat.S_ISREG(info.st_mode):
                raise DecodeError("a folder, not a file" if stat.S_ISDIR(info.st_mode) else "not a regular file")
            _check_size(info.st_size)
            return self.path.open("rb")
        except FileNotFoundError:
            raise DecodeError("no such file") from None
        except OSError as error:
            raise DecodeError(f"cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True)
class MemberSource:
    """A member of a zip archive."""

    archive: Path
    member: str

    @property
    def name(self) -> str:
        return f"{self.archive.name}/{self.member}"

    def open(self) -> Stream:
        try:
            archive = open_archive(self.archive)
            _check_size(archive.getinfo(self.member).file_size)
            return io.BytesIO(archive.read(self.member))
        except KeyError:
            raise DecodeError(f"no such member of {self.archive.name}") from None
        except DecodeError:
            raise
        # A damaged archive fails in many ways: checksums, unknown compression, encryption, lying offsets.
        except Exception as error:
            raise DecodeError(f"cannot be unpacked: {error or type(error).__name__}") from error


@dataclass(frozen=True, slots=True)
class BytesSource:
    """Bytes in memory, such as a cell of a Parquet file."""

    data: bytes
    name: str

    def open(self) -> Stream:
        if not self.data:
            raise DecodeError("empty: 0 bytes")
        return io.BytesIO(self.data)


@dataclass(frozen=True, slots=True)
class Folder:
    """Files below a folder; nothing outside it is opened unless `allow_outside` is set."""

    path: Path
    allow_outside: bool = False

    def source(self, path: str) -> Source:
        _refuse_scheme(path)
        full = self.path / path
        if not self.allow_outside:
            try:
                inside = full.resolve().is_relative_to(self.path.resolve())
            except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of links, too long a name
                raise DecodeError(f"not a path: {error}") from error
            if not inside:
                raise DecodeError(f"leads out of {self.path.name}/: refused without data.allow_outside_root=true")
        return FileSource(full, path)


@dataclass(frozen=True, slots=True)
class Archive:
    """Files of a zip archive, below `folder` inside it."""

    path: Path
    folder: str = ""

    def source(self, path: str) -> Source:
        _refuse_scheme(path)
        inside = normpath(path)
        if inside.startswith(("../", "/")) or inside == "..":
            raise DecodeError(f"leads out of {self.path.name}: refused")
        return MemberSource(self.path, f"{self.folder}/{inside}" if self.folder else inside)


def open_archive(path: Path) -> zipfile.ZipFile:
    """The opened archive, kept open for this process; a forked worker opens its own, as handles share an offset."""
    return _archive(path, os.getpid())


@lru_cache(maxsize=16)
def _archive(path: Path, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _refuse_scheme(path: str) -> None:
    if _SCHEME.match(path):
        raise DecodeError("an address, not a file: only files are read, never a URL or a pipe")


def _check_size(size: int) -> None:
    if size == 0:
        raise DecodeError("empty: 0 bytes")
    if size > MAX_FILE_BYTES:
        raise DecodeError(f"{size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")
