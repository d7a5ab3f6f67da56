from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from mmformer.datasets import sources
from mmformer.datasets.sources import Archive, BytesSource, DecodeError, Folder, MemberSource


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "secret.png").write_bytes(b"secret")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").write_bytes(b"inside")
    (root / "empty.png").touch()
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "in.png").symlink_to(root / "sub" / "a.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize("path", ["sub/a.png", "./sub/../sub/a.png", "in.png"])
def test_what_is_inside_is_read(root, path) -> None:
    with Folder(root).source(path).open() as stream:
        assert stream.read() == b"inside"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", r"leads out of root/: refused without data\.allow_outside_root=true"),
        ("sub/../../secret.png", "leads out"),
        ("/etc/passwd", "leads out"),
        ("out.png", "leads out"),
        ("http://host/a.png", "an address, not a file"),
        ("file:///etc/passwd", "an address, not a file"),
        ("pipe:cat a.png", "an address, not a file"),
        ("a\0.png", "not a path"),
        ("missing.png", "no such file"),
        ("sub", "a folder, not a file"),
        ("pipe.png", "not a regular file"),
        ("empty.png", "empty: 0 bytes"),
        ("loop.png", "not a path|cannot be read|leads out"),
        ("x" * 300 + ".png", "cannot be read: File name too long"),
    ],
)
def test_what_is_not_a_file_inside_has_a_reason(root, path, reason) -> None:
    with pytest.raises(DecodeError, match=reason):
        Folder(root).source(path).open()


def test_outside_is_opened_only_when_allowed(root) -> None:
    with Folder(root, allow_outside=True).source("../secret.png").open() as stream:
        assert stream.read() == b"secret"
    with pytest.raises(DecodeError, match="address"):
        Folder(root, allow_outside=True).source("http://host/a.png")


def test_too_large_a_file_is_refused_unread(root, monkeypatch) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 5)
    with pytest.raises(DecodeError, match="6 bytes, more than the limit of 5"):
        Folder(root).source("sub/a.png").open()


def test_members_of_archives(tmp_path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("set/a.png", b"inside" * 100, zipfile.ZIP_DEFLATED)
        archive.writestr("b.png", b"beside")
        archive.writestr("set/empty.png", b"")
    assert Archive(path, "set").source("./a.png").open().read() == b"inside" * 100
    for name, reason in [
        ("../b.png", "leads out of a.zip"),
        ("/b.png", "leads out"),
        ("https://host/a.png", "an address"),
    ]:
        with pytest.raises(DecodeError, match=reason):
            Archive(path, "set").source(name)
    for name, reason in [("c.png", "no such member of a.zip"), ("empty.png", "empty")]:
        with pytest.raises(DecodeError, match=reason):
            Archive(path, "set").source(name).open()


def test_a_damaged_member_has_a_reason(tmp_path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"inside" * 10)
    path.write_bytes(path.read_bytes().replace(b"insideinside", b"insidEinside", 1))
    with pytest.raises(DecodeError, match="cannot be unpacked: Bad CRC-32"):
        MemberSource(path, "a.png").open()


def test_bytes() -> None:
    assert BytesSource(b"x", "cell").open().read() == b"x"
    with pytest.raises(DecodeError, match="empty"):
        BytesSource(b"", "cell").open()
