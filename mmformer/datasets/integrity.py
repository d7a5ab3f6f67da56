"""Checksums of the files of a manifest, in a file beside it that `sha256sum --check` reads too.

Most damage to a picture or a sound decodes to something, and says nothing: only a checksum finds it.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmformer.datasets.sources import DecodeError, FileSource, MemberSource, Source, Stream
from mmformer.datasets.tables import ManifestError

SUFFIX = ".sha256"
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_ESCAPED = {escaped: char for char, escaped in _ESCAPES.items()}


@dataclass(frozen=True, slots=True)
class CheckedSource:
    """A source whose bytes are compared with their sha256 before any of them are used; None is of one that has none."""

    source: Source
    digest: str | None

    @property
    def name(self) -> str:
        return self.source.name

    def open(self) -> Stream:
        """All of the bytes, in memory. Raises DecodeError where they are others than those of the checksum."""
        with self.source.open() as stream:
            data = stream.read()
        if self.digest is None:
            raise DecodeError("its checksum is not known: write the checksums anew")
        if (found := hashlib.sha256(data).hexdigest()) != self.digest:
            raise DecodeError(f"damaged or changed: its sha256 is {found[:12]}..., not {self.digest[:12]}...")
        return io.BytesIO(data)


def unchecked(source: Source) -> Source:
    """The source without the comparison, for reading no more than its header."""
    return source.source if isinstance(source, CheckedSource) else source


def sidecar(path: Path, table: str) -> Path:
    """The file of checksums of a manifest: beside a file, and in a folder beside its table."""
    return path / f"{table}{SUFFIX}" if path.is_dir() else path.with_name(path.name + SUFFIX)


def key(source: Source, sums: Path) -> str:
    """What a source is called in the file `sums`: its path from there; behind that of an archive the member."""
    source = unchecked(source)
    if isinstance(source, FileSource):
        return _relative(source.path, sums)
    if isinstance(source, MemberSource):
        return f"{_relative(source.archive, sums)}/{source.member}"
    return source.name


def _relative(path: Path, sums: Path) -> str:
    return os.path.relpath(path, sums.parent).replace(os.sep, "/")


def read_checksums(path: Path) -> dict[str, str]:
    """The sha256 of each file by its name.

    Raises:
        ManifestError: no such file, or a line that is none of `sha256sum`.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except FileNotFoundError:
        raise ManifestError(
            f"data.checksums=true, but there is no {path}: write it with `mmformer data check --checksums`"
        ) from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        if not (match := _LINE.fullmatch(line)):
            raise ManifestError(f"{path}: line {number} is no checksum and name: write the checksums anew")
        escaped, digest, name = match.groups()
        found[re.sub(r"\\[\\nr]", lambda m: _ESCAPED[m[0]], name) if escaped else name] = digest
    return found


def write_checksums(path: Path, digests: Mapping[str, str]) -> None:
    """Write the sha256 of files by their names, in the order of the names."""
    lines = []
    for name, digest in sorted(digests.items()):
        written = "".join(_ESCAPES.get(char, char) for char in name)
        lines.append(f"{'' if written == name else chr(92)}{digest}  {written}\n")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(lines), encoding="utf-8", errors="surrogateescape", newline="\n")
    os.replace(temporary, path)
