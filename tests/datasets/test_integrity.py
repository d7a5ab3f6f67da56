"""A file that is not what it was when its checksum was taken is a fault of its rows, whatever it decodes to."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmformer.datasets.dataset import ManifestDataset, scan
from mmformer.datasets.features import Picture
from mmformer.datasets.integrity import CheckedSource, key, read_checksums, sidecar, write_checksums
from mmformer.datasets.manifest import Manifest, read_manifest
from mmformer.datasets.sources import BytesSource, DecodeError
from mmformer.datasets.tables import ManifestError

NAMES = ["a.png", "sub/b.png", "ü b.png"]


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in NAMES:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
    (tmp_path / "rows.csv").write_text("id,image\n" + "".join(f"{i},{name}\n" for i, name in enumerate(NAMES)))
    return tmp_path


def sums(rows: Manifest) -> dict[str, str]:
    found = {}
    for row in range(len(rows)):
        source = rows.source("image", row)
        assert source is not None
        with source.open() as stream:
            found[key(source, rows.sums)] = hashlib.sha256(stream.read()).hexdigest()
    return found


def faults(path: Path) -> dict[str, str]:
    rows = read_manifest(path, {"split": None}, checksums=True)
    assert scan(rows, {"image": Picture()}) == [], "headers are read without the comparison"
    dataset = ManifestDataset(rows, None, {"image": Picture()})
    assert all(dataset.num_tokens())
    batch = dataset.__getitems__([(0, i) for i in range(len(rows))])
    assert {*batch.ids, *(fault.id for fault in batch.faults)} == {rows.id(i) for i in range(len(rows))}
    return {fault.id: fault.reason for fault in batch.faults}


def test_a_changed_file_and_one_without_a_checksum_are_faults(folder):
    rows = read_manifest(folder / "rows.csv")
    known = sums(rows)
    assert list(known) == NAMES
    write_checksums(rows.sums, known)
    assert rows.sums == folder / "rows.csv.sha256"
    assert faults(folder / "rows.csv") == {}
    Image.new("RGB", (9, 7)).save(folder / "a.png")
    changed = hashlib.sha256((folder / "a.png").read_bytes()).hexdigest()
    found = faults(folder / "rows.csv")
    assert found == {
        "0": f"damaged or changed: its sha256 is {changed[:12]}..., not {known['a.png'][:12]}...",
    }
    write_checksums(rows.sums, {name: known[name] for name in NAMES[:2]})
    assert faults(folder / "rows.csv")["2"] == "its checksum is not known: write the checksums anew"


def test_the_file_of_checksums_is_that_of_sha256sum(folder):
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum, which this system lacks")
    strange = folder / "a\\b\nc.png"
    strange.write_bytes(b"x")
    digests = sums(read_manifest(folder / "rows.csv")) | {strange.name: hashlib.sha256(b"x").hexdigest()}
    write_checksums(folder / "rows.csv.sha256", digests)
    done = subprocess.run(
        ["sha256sum", "--strict", "--check", "rows.csv.sha256"], cwd=folder, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.count("OK")) == (0, 4), done.stderr
    made = subprocess.run(["sha256sum", *NAMES, strange.name], cwd=folder, capture_output=True, text=True).stdout
    (folder / "made.sha256").write_text(made)
    assert read_checksums(folder / "made.sha256") == digests


@given(names=st.lists(st.text(min_size=1).filter(lambda name: "\0" not in name), unique=True))
def test_names_of_any_kind_come_back(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("sums") / "x.sha256"
    digests = {name: hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest() for name in names}
    try:
        "".join(names).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return  # no name that a file can have
    write_checksums(path, digests)
    assert read_checksums(path) == digests


@pytest.mark.parametrize("line", ["zz  a.png", "0" * 64 + " a", "0" * 63 + "  a.png", "0" * 64])
def test_a_damaged_file_of_checksums_is_an_error(tmp_path, line):
    (tmp_path / "x.sha256").write_text(f"{'0' * 64}  ok.png\n{line}\n")
    with pytest.raises(ManifestError, match=r"x\.sha256: line 2 is no checksum"):
        read_checksums(tmp_path / "x.sha256")


def test_without_the_file_of_checksums_it_says_how_to_write_it(folder):
    with pytest.raises(ManifestError, match=r"there is no .*rows\.csv\.sha256: .*mmformer data check --checksums"):
        read_manifest(folder / "rows.csv", checksums=True)


def test_archives_folders_and_cells_have_names_too(folder, tmp_path_factory):
    archive = tmp_path_factory.mktemp("zip") / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ["rows.csv", *NAMES]:
            file.write(folder / name, name)
    for path, expected in ((archive, "set.zip/a.png"), (folder, "a.png")):
        rows = read_manifest(path, {"split": None})
        known = sums(rows)
        assert next(iter(known)) == expected
        write_checksums(rows.sums, known)
        assert faults(path) == {}
    assert sidecar(folder, "rows.csv") == folder / "rows.csv.sha256"
    assert sidecar(archive, "rows.csv") == archive.parent / "set.zip.sha256"
    source = CheckedSource(BytesSource(b"x", "rows.parquet, row '3', image"), hashlib.sha256(b"x").hexdigest())
    assert key(source, rows.sums) == source.name == "rows.parquet, row '3', image"
    assert source.open().read() == b"x"
    with pytest.raises(DecodeError, match="damaged or changed"):
        CheckedSource(source.source, "0" * 64).open()
