"""The embedded data set: consistent, split cleanly, and with the chance levels that its README states."""

from __future__ import annotations

import csv
import importlib.util
import io
import re
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

FOLDER = Path(__file__).parents[1] / "data" / "digits"
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def prepare():
    pytest.importorskip("sklearn", reason="scikit-learn makes the data set and is an extra")
    spec = importlib.util.spec_from_file_location("digits_prepare", FOLDER / "prepare.py")
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures() -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(FOLDER / "pictures.parquet").to_pylist()}


@pytest.fixture(scope="module")
def speech() -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(FOLDER / "speech.parquet").to_pylist()}


@pytest.fixture(scope="module")
def questions() -> list[dict[str, str]]:
    with (FOLDER / "questions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def by_split(rows, key) -> list[set]:
    return [{key(row) for row in rows if row["split"] == split} for split in SPLITS]


def disjoint(sets: list[set]) -> bool:
    return all(sets) and sum(map(len, sets)) == len(set.union(*sets))


def test_questions_name_rows_of_their_own_split(questions, pictures, speech):
    assert len({row["id"] for row in questions}) == len(questions)
    for row in questions:
        picture, sound = pictures[row["image"]], speech[row["audio"]]
        assert {picture["split"], sound["split"]} == {row["split"]}
        assert (picture["label"], sound["label"]) == (int(row["image_digit"]), int(row["audio_digit"]))


def test_labels_follow_from_the_digits(questions):
    rule = {"image": lambda i, a: i, "audio": lambda i, a: a, "max": max, "min": min}
    for row in questions:
        assert int(row["label"]) == rule[row["kind"]](int(row["image_digit"]), int(row["audio_digit"]))


def test_splits_share_no_picture_recording_or_voice(pictures, speech):
    assert disjoint(by_split(pictures.values(), lambda row: np.asarray(Image.open(io.BytesIO(row["image"]))).tobytes()))
    assert disjoint(by_split(speech.values(), lambda row: soundfile.read(io.BytesIO(row["audio"]))[0].tobytes()))
    assert disjoint(by_split(speech.values(), lambda row: row["voice"].split("+")[1]))


def test_every_kind_asks_every_pair_equally_often(questions):
    for split in SPLITS:
        rows = [row for row in questions if row["split"] == split]
        cells = Counter((row["kind"], row["image_digit"], row["audio_digit"]) for row in rows)
        assert len(cells) == 400
        assert len(set(cells.values())) == 1


def test_every_picture_and_recording_is_used(questions, pictures, speech):
    assert {row["image"] for row in questions} == set(pictures)
    assert {row["audio"] for row in questions} == set(speech)


def test_test_phrasings_are_new_and_their_words_known(questions):
    train, val, test = by_split(questions, lambda row: row["text"])
    assert not test & (train | val)
    assert {word for text in test for word in text.split()} <= {word for text in train for word in text.split()}


def test_media_decode(pictures, speech):
    for row in pictures.values():
        picture = Image.open(io.BytesIO(row["image"]))
        assert (picture.mode, picture.size) == ("L", (8, 8))
    for row in speech.values():
        samples, rate = soundfile.read(io.BytesIO(row["audio"]), dtype="int16")
        assert rate == 8000
        assert samples.ndim == 1
        assert 0.1 <= len(samples) / rate <= 1.5
        assert np.abs(samples.astype(int)).max() > 16000


def test_pictures_are_those_of_scikit_learn(prepare, pictures):
    assert prepare.pictures(seed=0) == list(pictures.values())


def test_questions_are_made_again_from_the_seed(prepare, questions, pictures, speech):
    again = prepare.questions(list(pictures.values()), list(speech.values()), seed=0)
    assert [{key: str(value) for key, value in asdict(row).items()} for row in again] == questions


def test_ceilings_are_those_of_the_readme(prepare, questions):
    asked = [prepare.Question(**row) for row in questions if row["split"] == "test"]
    found = prepare.ceilings(asked)
    expected = {"t": 0.145, "i": 0.55, "a": 0.55, "ti": 0.55, "ta": 0.55, "ia": 0.55, "tia": 1.0}
    assert found == pytest.approx(expected)
    table = re.search(r"^\| t \|.*\n.*\n\| (.*) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert table is not None
    assert [float(cell) for cell in table[1].split("|")] == [round(100 * value, 1) for value in found.values()]


def test_size_is_bounded():
    sizes = [path.stat().st_size for path in FOLDER.iterdir() if path.is_file()]
    assert max(sizes) < 5e6
    assert sum(sizes) < 6e6
