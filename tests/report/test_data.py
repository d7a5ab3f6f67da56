from __future__ import annotations

import csv
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmformer.datasets.manifest import Manifest, read_manifest
from mmformer.objectives import Classes
from mmformer.report import Answers, read_predictions, read_run
from mmformer.report.collect import Collector, report_test
from mmformer.report.data import count_data, manifest_media, manifest_rows, media_of, training_majority
from tests.report.runs import picture_file, sound_file


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Pictures in another manifest's cells, sounds in files, texts in the rows; some absent, one gone."""
    pictures = pa.table({"id": ["p0", "p1"], "photo": [picture_file(0), picture_file(1)]})
    pq.write_table(pictures, tmp_path / "pictures.parquet")
    (tmp_path / "s.wav").write_bytes(sound_file(1))
    rows = [
        ("a", "train", "hello", "p0", "s.wav", "yes", "x"),
        ("b", "train", "", "p1", "", "no", "y"),
        ("c", "val", "you", "", "", "yes", "y"),
        ("f", "train", "more", "", "", "no", "y"),
        ("d", "test", "<b>", "p1", "s.wav", "yes", "x"),
        ("e", "test", "last", "", "gone.wav", "no", "y"),
    ]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "split", "words", "image", "audio", "label", "kind"])
        writer.writerows(rows)
    return read_manifest(tmp_path / "rows.csv", {"text": "words"}, references={"image": "pictures.parquet:photo"})


def test_rows_have_text_references_and_the_other_columns(manifest):
    rows = manifest_rows(manifest, ["d", "b"])
    assert list(rows) == ["d", "b"]
    assert (rows["d"]["text"], rows["d"]["audio"], rows["d"]["kind"]) == ("<b>", "s.wav", "x")
    assert rows["d"]["image"] == "pictures.parquet:p1"
    assert "audio" not in rows["b"]
    assert rows["b"]["text"] is None
    assert "label" not in rows["b"]


def test_media_are_read_wherever_they_are(manifest):
    read = manifest_media(manifest)
    assert read({"id": "d"}, "image") == picture_file(1)
    assert read({"id": "d"}, "audio") == sound_file(1)
    assert read({"id": "b"}, "audio") is None
    assert read({"id": "b"}, "video") is None
    with pytest.raises(ValueError, match="no such file"):
        read({"id": "e"}, "audio")


def test_the_config_of_a_run_finds_them_again(manifest, tmp_path):
    columns = {"id": "auto", "text": "words", "image": "auto"}
    data = {"path": str(tmp_path / "rows.csv"), "columns": columns, "references": {"image": "pictures.parquet:photo"}}
    read = media_of({"data": data})
    assert read is not None
    assert read({"id": "d"}, "image") == picture_file(1)
    (tmp_path / "rows.csv").unlink()
    gone = media_of({"data": data})
    assert gone is not None
    assert gone({"id": "d"}, "image") is None
    with pytest.raises(FileNotFoundError, match=r"rows\.csv: no such file"):
        gone({"id": "d", "image": "p1"}, "image")
    assert media_of({"data": {"path": None}}) is None


def test_counts_and_the_majority(manifest):
    assert count_data(manifest) == {
        "train": {"text+image+audio": 1, "image": 1, "text": 1},
        "val": {"text": 1},
        "test": {"text+image+audio": 1, "text+audio": 1},
    }
    assert training_majority(manifest) == "no"


def test_a_tested_run_gets_all_its_files(manifest, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text('{"test/acc": 0.5}')
    (run / "data_errors.jsonl").write_text('{"id": "e", "column": "audio", "path": "gone.wav", "reason": "gone"}\n')
    collector = Collector({"answer": Classes(head="answer", target="label")})
    answers = Answers(ids=("d", "e"), outputs=np.array([[1.0, 0], [0, 1]]), targets=np.array([0, 0]))
    monkeypatch.setattr(collector, "answers", lambda: {"": answers})
    page = report_test(run, collector, manifest, ["no", "yes"], datetime(2026, 3, 1, tzinfo=UTC), seconds=3.0)
    text = page.read_text()
    assert "&lt;b&gt;" not in text, "a right answer is no error"
    assert "audio not shown: no such file" in text
    assert "audio gone.wav: gone" in text
    said, about = read_predictions(run), read_run(run).about
    assert said is not None
    assert said.column("kind") == ["x", "y"]
    assert said.column("fault") == [None, "audio gone.wav: gone"]
    assert (about["majority"], about["seconds"]) == ("no", 3.0)
    assert about["data"]["test"] == {"text+image+audio": 1, "text+audio": 1}
