"""Texts that a model writes and filters are those that it writes and judges one by one, and make a manifest again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mmformer
from mmformer.capfilt import capfilt
from mmformer.checkpoints import build, save_model
from mmformer.cli import main
from mmformer.datasets.manifest import read_manifest
from mmformer.datasets.tokenizers import ByteTokenizer
from mmformer.generation import Greedy, Sampling
from mmformer.objectives.starting import starting_with
from mmformer.predict import Predictor
from tests.checkpoints.configs import run_config
from tests.helpers import scramble
from tests.report.runs import picture_file, sound_file
from tests.test_predict import save, write_manifest
from tests.test_writing import config, words

FIRST = 3
MATCHING = {
    "_target_": "mmformer.objectives.StartingWith",
    "first": FIRST,
    "objective": {
        "_target_": "mmformer.objectives.Matching", "modalities": ["text", "image", "audio"], "anchor": "text",
        "head": "match", "weighting": None, "top": 0,
    },
}  # fmt: skip


def blip(folder: Path) -> Path:
    """A run that writes and judges."""
    held = config(words())
    held["objectives"]["match"] = MATCHING
    held["model"]["heads"]["match"] = {"_target_": "mmformer.heads.Head", "dim": 24, "num_outputs": 2}
    model = scramble(build(held["model"]), seed=2)
    objectives = {name: build(part) for name, part in held["objectives"].items()}
    save_model(folder / "model", model, held, ByteTokenizer(), objectives)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Twelve rows: two of one picture, one of a broken one, one without a text, two of other splits; and a sound."""
    folder = tmp_path_factory.mktemp("capfilt")
    rows = [{"id": f"r{i}", "split": "train", "text": f"what, {i}?", "image": f"{i}.png"} for i in range(12)]
    for i in range(12):
        (folder / f"{i}.png").write_bytes(picture_file(i, (12 + i, 14)))
    (folder / "0.wav").write_bytes(sound_file(3, 0.2))
    rows[4] |= {"image": "3.png"}
    rows[6] |= {"text": ""}
    rows[7] |= {"split": "test"}
    rows[8] |= {"split": "val"}
    (folder / "5.png").write_bytes(b"no picture")
    write_manifest(folder / "rows.csv", rows)
    write_manifest(folder / "both.csv", [rows[0] | {"audio": "0.wav"}])
    blip(folder / "run")
    save(folder / "other", run_config())
    return folder


@pytest.fixture(scope="module")
def predictor(place: Path) -> Predictor:
    return mmformer.load(place / "run")


def judged(predictor: Predictor, path: Path, text: str) -> float:
    """The probability that a picture and a text match."""
    (_, batch), *_ = predictor._batches([{"image": path, "text": text}], strict=True)
    batch.inputs["text"] = starting_with(batch.inputs["text"], FIRST)
    with torch.no_grad():
        logits, _ = predictor.model.output(predictor.model.encode(batch), "match")
    return float(logits.softmax(-1)[0, 1])


def test_texts_are_written_and_judged_as_one_by_one(place, predictor):
    found = capfilt(predictor, predictor, place / "rows.csv", search=Greedy(), max_length=6, threshold=0.4)
    name = found.manifest.id
    own = {name(pair.row): pair for pair in found.pairs if pair.source == "original"}
    new = {name(pair.row): pair for pair in found.pairs if pair.source == "synthetic"}
    assert set(own) == {f"r{i}" for i in range(12)} - {"r5", "r6"}
    assert set(new) <= {f"r{i}" for i in range(12)} - {"r4", "r5", "r7", "r8"}  # one text a picture
    assert len(new) > 4
    assert [fault.split(":")[0] for fault in found.faults] == ["r5"]
    assert (own["r7"].match, own["r7"].kept) == (None, True)
    for id, pair in new.items():
        path = place / f"{id[1:]}.png"
        assert pair.text == predictor.generate({"image": path}, max_length=6).strip()
        assert pair.match == pytest.approx(judged(predictor, path, pair.text), abs=1e-5)
    assert own["r4"].match == pytest.approx(judged(predictor, place / "3.png", "what, 4?"), abs=1e-5)
    asked = [pair for pair in found.pairs if pair.match is not None]
    assert all(pair.kept == (pair.match >= 0.4) for pair in asked)
    kept = {source: sum(pair.kept for pair in asked if pair.source == source) for source in ("original", "synthetic")}
    assert found.counts() == {"original": (kept["original"], 8), "synthetic": (kept["synthetic"], len(new))}


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_batch(place):
    one, other = mmformer.load(place / "run"), mmformer.load(place / "run")
    other.batch_size = 3
    options = {"max_length": 6, "threshold": 0.0}
    first = capfilt(one, one, place / "rows.csv", search=Sampling(top_p=0.9, seed=4), **options)
    again = capfilt(other, other, place / "rows.csv", search=Sampling(top_p=0.9, seed=4), **options)
    changed = capfilt(one, one, place / "rows.csv", search=Sampling(top_p=0.9, seed=5), **options)
    texts = [[pair.text for pair in found.pairs] for found in (first, again, changed)]
    assert texts[0] == texts[1] != texts[2]


def run(capsys, *said) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in ("capfilt", *said)])
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("where", ["beside", "elsewhere"])
def test_the_table_is_a_manifest_again(place, predictor, tmp_path, capsys, where):
    out = (place if where == "beside" else tmp_path) / "clean.jsonl"
    code, said = run(capsys, place / "run", place / "rows.csv", "-o", out, "--top-p", 0, "--threshold", 0)
    assert code == 0, said
    assert "original: 8 of 8 texts kept" in said
    assert "1 rows could not be read and are left out: r5: image" in said
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["source"] for line in lines} == {"original", "synthetic"}
    assert f"{len(lines)} rows: data=manifest data.path={out}" in said
    references = dict(word.removeprefix("data.references.").split("=") for word in said.split() if "references" in word)
    assert bool(references) == (where == "elsewhere")
    manifest, before = read_manifest(out, references=references), read_manifest(place / "rows.csv")
    rows = {before.id(row): row for row in range(len(before))}
    assert len(manifest.rows("test")) == 1
    for row, line in enumerate(lines):
        with (
            manifest.source("image", row).open() as one,
            before.source("image", rows[line["id"].split("~")[0]]).open() as two,
        ):
            assert one.read() == two.read()
        assert manifest.text(row) == line["text"]


def test_the_command_says_what_is_wrong(place, tmp_path, capsys):
    out, runs = tmp_path / "o.csv", (place / "run", place / "other")
    cases = {
        (runs[1], place / "rows.csv", "-o", out): "was trained for label, which writes no texts",
        (
            runs[0],
            place / "rows.csv",
            "-o",
            out,
            "--matcher",
            runs[1],
        ): "judges no pairs: take a run with",
        (
            runs[0],
            place / "both.csv",
            "-o",
            out,
        ): "has image and audio: say which of them is written about",
        (runs[0], place / "rows.csv", "-o", out, "--modality", "audio"): "has no audio: it has text, image, the models",
        (runs[0], place / "rows.csv", "-o", tmp_path / "o.txt"): "it ends in one of .csv",
    }
    for given, message in cases.items():
        code, said = run(capsys, *given)
        assert code == 2, said
        assert message in said


def test_sounds_get_texts_just_as_pictures_do(place, predictor):
    found = capfilt(predictor, predictor, place / "both.csv", "audio", search=Greedy(), max_length=6, threshold=0.0)
    assert [pair.source for pair in found.pairs] == ["original", "synthetic"]
    assert found.pairs[1].text == predictor.generate({"audio": place / "0.wav"}, max_length=6).strip()
