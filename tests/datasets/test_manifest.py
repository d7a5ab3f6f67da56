from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmformer.datasets.manifest import read_manifest
from mmformer.datasets.sources import DecodeError, Source
from mmformer.datasets.tables import ManifestError, cell

# UTF-8 has no surrogates, and a CSV cell cannot tell an empty text from an absent one.
CELLS = st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
ROWS = st.lists(st.tuples(CELLS, CELLS, st.sampled_from(["train", "val", "test"])), min_size=1, max_size=8)


def write_csv(path: Path, rows: list[dict], separator: str = ",", **options) -> Path:
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator, quoting=csv.QUOTE_ALL, **options)
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def content(source: Source | None) -> bytes | None:
    if source is None:
        return None
    with source.open() as stream:
        return stream.read()


def small(num_rows: int = 6, **columns: list) -> list[dict]:
    rows = [{"id": f"r{i}", "text": f"text {i}"} for i in range(num_rows)]
    return [row | {name: cells[i] for name, cells in columns.items()} for i, row in enumerate(rows)]


@given(rows=ROWS, separator=st.sampled_from(",;\t|"), encoding=st.sampled_from(["utf-8", "utf-8-sig"]))
def test_any_text_survives_every_format(tmp_path_factory, rows, separator, encoding) -> None:
    folder = tmp_path_factory.mktemp("m")
    rows = [*rows, ("x", None, "train")]  # a column with nothing in it would be no modality
    table = [{"id": str(i), "split": s, "text": t, "note": n} for i, (t, n, s) in enumerate(rows)]
    read = [
        read_manifest(write_csv(folder / "a.csv", table, separator, encoding=encoding)),
        read_manifest(write_jsonl(folder / "a.jsonl", table)),
        read_manifest(write_parquet(folder / "a.parquet", table)),
    ]
    for manifest in read:
        assert [cell(manifest.inputs["text"].column, i) for i in range(len(rows))] == [row["text"] for row in table]
        assert manifest.column("note") == [row["note"] for row in table]
        assert [manifest.id(i) for i in range(len(rows))] == [row["id"] for row in table]
        codes, texts = manifest.inputs["text"].codes, [row["text"] for row in table]
        for i, text in enumerate(texts):
            assert (codes[i] == -1) == (text is None)
            assert [codes[j] == codes[i] for j in range(len(texts))] == [other == text for other in texts]


def test_lone_surrogate_of_json_survives(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "a\\ud800b"}\n{"id": 2, "text": null}\n')
    manifest = read_manifest(tmp_path / "a.jsonl")
    assert manifest.text(0) == "a\ud800b"
    assert manifest.text(1) is None


def test_columns_are_found_mapped_or_left_out(tmp_path) -> None:
    path = write_csv(tmp_path / "a.csv", small(caption=list("abcdef"), photo=["x.png"] * 6))
    assert read_manifest(path).modalities == ("text",)
    mapped = read_manifest(path, {"text": "caption", "image": "photo", "audio": None, "depth": "photo"})
    assert mapped.modalities == ("text", "image", "depth")
    assert mapped.text(2) == "c"
    assert "columns not used: text" in mapped.notes


def test_an_empty_column_is_no_modality_unless_asked_for(tmp_path) -> None:
    path = write_csv(tmp_path / "a.csv", small(image=[""] * 6))
    assert read_manifest(path).modalities == ("text",)
    assert read_manifest(path, {"audio": "image"}).modalities == ("text", "audio")
    with pytest.raises(ManifestError, match="text, image or audio with anything in it; it has id, text, image"):
        read_manifest(path, {"text": None})


def test_an_entry_of_the_same_name_asks_for_nothing(tmp_path) -> None:
    same = {role: role for role in ("id", "split", "text", "image", "audio", "label")}
    path = write_csv(tmp_path / "a.csv", small(label=[""] * 6))
    manifest = read_manifest(path, same)
    assert (manifest.modalities, manifest.kind) == (("text",), None)
    assert "columns not used: label" in manifest.notes
    with pytest.raises(ManifestError, match="has no column 'depth'"):
        read_manifest(path, same | {"depth": "depth"})
    with pytest.raises(ManifestError, match="'note' has no label in any of 6 rows"):
        read_manifest(write_csv(tmp_path / "b.csv", small(note=[""] * 6)), same | {"label": "note"})


def test_a_column_that_is_not_there_is_named_with_what_to_write(tmp_path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"id": "1", "pic": "a.png", "caption": "x"}], ";")
    with pytest.raises(ManifestError, match=r"no column 'photo' .*id, pic, caption.*data\.columns\.image=<column>"):
        read_manifest(path, {"image": "photo"})
    with pytest.raises(ManifestError, match=r"id, pic, caption \(separator ';'\); write data\.columns\.text=caption"):
        read_manifest(path)
    with pytest.raises(ManifestError, match=r"no column for 'label'; it has"):
        read_manifest(path, {"text": "caption"}).require("text", "label")


def test_double_and_missing_ids_are_named(tmp_path) -> None:
    with pytest.raises(ManifestError, match=r"1 ids stand in several rows: 'x'"):
        read_manifest(write_csv(tmp_path / "a.csv", [{"id": i, "text": "a"} for i in "xyx"]))
    with pytest.raises(ManifestError, match=r"1 rows have no id, such as row 2"):
        read_manifest(write_csv(tmp_path / "b.csv", [{"id": i, "text": "a"} for i in ("x", "", "y")]))


def test_empty_tables_and_splits_are_clear_errors(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n")
    with pytest.raises(ManifestError, match=r"a\.csv: no rows"):
        read_manifest(tmp_path / "a.csv")
    manifest = read_manifest(write_csv(tmp_path / "b.csv", small(split=["train"] * 6)))
    assert len(manifest.rows("val")) == 1, "a tenth of the rows that train validates where none is said to"
    with pytest.raises(ManifestError, match=r"split 'test' has no row \(train 5, val 1, test 0\)"):
        manifest.rows("test")
    assert manifest.rows(None).tolist() == list(range(6))


@pytest.mark.parametrize("form", ["folder", "zip", "zip with a folder"])
def test_a_folder_and_an_archive_hold_the_same(tmp_path, form) -> None:
    folder = tmp_path / "set"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "ä 1.png").write_bytes(b"bytes")
    write_csv(folder / "manifest.csv", [{"id": "1", "image": "pictures/ä 1.png"}, {"id": "2", "image": "../out.png"}])
    write_csv(folder / "other.csv", [{"a": "1"}])
    (tmp_path / "out.png").write_bytes(b"secret")
    path = folder
    if form != "folder":
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*.*")):
                archive.write(file, file.relative_to(folder if form == "zip" else tmp_path))
    manifest = read_manifest(path)
    assert content(manifest.source("image", 0)) == b"bytes"
    with pytest.raises(DecodeError, match="leads out of"):
        manifest.source("image", 1)


def test_several_tables_or_none_are_errors(tmp_path) -> None:
    with pytest.raises(ManifestError, match=r"has no table: put one called manifest\.csv"):
        read_manifest(tmp_path)
    for name in ("a.csv", "b.csv"):
        write_csv(tmp_path / name, small())
    with pytest.raises(ManifestError, match=r"several tables \(a\.csv, b\.csv\)"):
        read_manifest(tmp_path)
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(tmp_path / "c.csv")


def test_parquet_may_hold_the_bytes(tmp_path) -> None:
    rows = [
        {"id": "a", "image": b"one", "audio": {"bytes": b"two", "path": "x.wav"}},
        {"id": "b", "image": None, "audio": {"bytes": None, "path": "y.wav"}},
    ]
    (tmp_path / "y.wav").write_bytes(b"three")
    manifest = read_manifest(write_parquet(tmp_path / "a.parquet", rows))
    held = [[manifest.source(name, i) for i in range(2)] for name in ("image", "audio")]
    assert [list(map(content, row)) for row in held] == [[b"one", None], [b"two", b"three"]]
    assert manifest.inputs["image"].codes.tolist() == [0, -1]
    assert manifest.where("audio", 0) == "x.wav"
    assert manifest.where("image", 0) == "a.parquet, row 'a', image"


def test_cells_may_name_rows_of_another_manifest(tmp_path) -> None:
    write_parquet(tmp_path / "pictures.parquet", [{"id": i, "image": f"bytes of {i}".encode()} for i in "pqr"])
    write_csv(tmp_path / "rows.csv", [{"id": i, "image": p} for i, p in zip("1234", ("r", "p", "", "z"), strict=True)])
    manifest = read_manifest(tmp_path / "rows.csv", references={"image": "pictures.parquet:image"})
    sources = [manifest.source("image", i) for i in range(3)]
    assert list(map(content, sources)) == [b"bytes of r", b"bytes of p", None]
    with pytest.raises(DecodeError, match=r"pictures\.parquet has no row 'z'"):
        manifest.source("image", 3)
    assert manifest.inputs["image"].codes.tolist() == [2, 0, -1, -2]
    with pytest.raises(ManifestError, match=r"pictures\.parquet has no column 'photo'; it has id"):
        read_manifest(tmp_path / "rows.csv", references={"image": "pictures.parquet:photo"})


def test_splits_by_fold_and_by_hash_do_not_depend_on_the_order(tmp_path) -> None:
    rows = small(30, fold=[i % 5 for i in range(30)])
    path = write_csv(tmp_path / "a.csv", rows)
    folds = read_manifest(path, fold=4)
    assert [folds.rows(split).tolist() for split in ("val", "test")] == [list(range(k, 30, 5)) for k in (0, 4)]
    with pytest.raises(ManifestError, match=r"holds folds 0, 1, 2.*choose one to test with data\.fold=1"):
        read_manifest(path, {"split": "fold"})
    hashed = read_manifest(path)
    turned = read_manifest(write_csv(tmp_path / "b.csv", rows[::-1]))
    assert hashed.split.tolist() == turned.split.tolist()[::-1]
    assert (hashed.split != read_manifest(path, split_seed=1).split).any()


def test_wrong_values_of_a_split_column_are_named(tmp_path) -> None:
    path = write_csv(tmp_path / "a.csv", small(3, split=["Train", "VALIDATION", "holdout"]))
    with pytest.raises(ManifestError, match=r"row 'r2' has 'holdout' \(1 rows\): write train, val or test"):
        read_manifest(path)


def test_a_label_that_no_row_trains_is_noted(tmp_path) -> None:
    manifest = read_manifest(
        write_csv(tmp_path / "a.csv", small(4, label=list("abac"), split=["train", "train", "val", "test"]))
    )
    assert manifest.kind == "Classes"
    assert manifest.label_names == ("a", "b", "c")
    assert [manifest.target(i) for i in range(4)] == [0, 1, 0, 2]
    assert "labels that no row trains: c" in manifest.notes


def test_real_manifests_and_references(shared_data) -> None:
    folder = shared_data / "avdigits"
    references = {"image": "mnist.parquet:image_degraded", "audio": "fsdd.zip:audio_degraded"}
    pairs = read_manifest(folder / "pairs.csv", {"text": None}, references=references)
    assert [len(pairs.rows(split)) for split in ("train", "val", "test")] == [55_000, 5_000, 10_000]
    assert (pairs.kind, pairs.label_names) == ("Classes", tuple("0123456789"))
    assert [bool(content(pairs.source(name, 69_999))) for name in ("image", "audio")] == [True, True]
    assert (pairs.inputs["image"].codes >= 0).all()
    digits = np.array(pairs.column("label"), dtype=int)
    spoken = read_manifest(folder / "fsdd.zip", {"audio": "audio_degraded"})
    assert spoken.label is not None
    assert (spoken.label.values[pairs.inputs["audio"].codes] == digits).all()


@pytest.mark.parametrize(
    ("name", "modalities", "kind"),
    [
        ("easyvqa.zip", {"text", "image", "audio"}, "Classes"),
        ("emoji.zip", {"text", "image", "audio"}, None),
        ("icons.zip", {"text", "image"}, None),
        ("mandarin_words.zip", {"text", "audio"}, None),
    ],
)
def test_real_archives(shared_data, name, modalities, kind) -> None:
    manifest = read_manifest(shared_data / name)
    assert set(manifest.modalities) == modalities
    assert manifest.kind == kind
    assert all(len(manifest.rows(split)) for split in ("train", "val", "test"))
