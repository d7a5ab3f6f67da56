"""Evaluation says what meters of training say, and adds intervals, subsets, noise, and the field's protocols."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mmformer
from mmformer.cli import main
from mmformer.datasets.degrade import Degradation, standard
from mmformer.datasets.tables import ManifestError
from mmformer.evaluate import Classification, Retrieval, ZeroShot, evaluate, judge
from mmformer.evaluate.page import JSON, PAGE
from mmformer.metrics.zeroshot import class_vectors
from mmformer.predict import Predictor
from tests.checkpoints.configs import NAMES, run_config
from tests.test_predict import save, write_manifest, write_media


def config() -> dict:
    """A classifier that embeds texts and pictures in one space as well."""
    made = run_config()
    head = {"_target_": "mmformer.heads.UnitHead", "dim": 24, "num_outputs": 9}
    made["model"]["heads"] |= {"text": head, "image": head}
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_manifest(folder / "rows.csv", write_media(folder, 28))
    save(folder / "run", config())
    return folder


@pytest.fixture(scope="module")
def predictor(place: Path) -> Predictor:
    return mmformer.load(place / "run")


def two_strengths(recordings: dict[str, torch.Tensor]) -> tuple[Degradation, ...]:
    """The standard degradations, the mildest and the strongest of each."""
    return tuple(replace(one, strengths=(one.strengths[0], one.strengths[-1])) for one in standard(recordings))


def test_classification_equals_the_meters_of_training(
    predictor: Predictor, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "standard", lambda recordings: ())
    found = evaluate(predictor, place / "rows.csv", Classification(), None, robustness=True, resamples=50)
    wanted = predictor.evaluate(place / "rows.csv", None)
    assert found.metrics["acc"].value == pytest.approx(wanted["acc"])
    assert set(found.subsets) == {"t", "i", "a", "ti", "ta", "ia", "tia"}
    for letters, metrics in found.subsets.items():
        assert metrics["acc"].value == pytest.approx(wanted[f"acc_{letters}"])
    answers = predictor.answer(place / "rows.csv")
    likelihood = [-math.log(a.probabilities[NAMES[i % 7]]) for i, a in enumerate(answers)]
    assert found.metrics["nll"].value == pytest.approx(np.mean(likelihood), rel=1e-4)
    for interval in found.metrics.values():
        assert interval.low <= interval.value <= interval.high or interval.low > interval.value  # ece is biased upwards
    assert found.facts == {"data": str(place / "rows.csv"), "split": "all", "rows": 28, "resamples": 50}


def test_noise_starts_from_the_rows_as_they_are(
    predictor: Predictor, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "standard", two_strengths)
    found = evaluate(predictor, place / "rows.csv", Classification(), "test", robustness=True, resamples=2)
    assert [curve.name for curve in found.curves] == [
        "blur", "crop", "pixel noise", "jpeg", "typos", "word drop", "white noise", "clipping", "babble",
    ]  # fmt: skip
    for curve in found.curves:
        assert len(curve.points) == 2
        own = evaluate_with(predictor, place, curve.modality)
        assert curve.clean["acc"].value == pytest.approx(own)
    changes = [abs(c.points[-1].metrics["nll"].value - c.clean["nll"].value) for c in found.curves]
    assert min(changes[0], changes[2], changes[4], changes[6], changes[8]) > 0
    monkeypatch.setattr(judge, "standard", lambda recordings: two_strengths(recordings)[4:6])
    again = evaluate(predictor, place / "rows.csv", Classification(), "test", robustness=True, resamples=2)
    assert again.curves == found.curves[4:6]


def evaluate_with(predictor: Predictor, place: Path, modality: str) -> float:
    """The accuracy over the test rows that have a modality."""
    kept = [a for i, a in enumerate(predictor.answer(place / "rows.csv")) if i % 2]
    rows = [i for i in range(28) if i % 2]
    manifest = predictor.manifest(place / "rows.csv", labelled=False)
    have = [manifest.inputs[modality][i] is not None for i in rows]
    right = [a.prediction == NAMES[i % 7] for a, i in zip(kept, rows, strict=True)]
    return float(np.mean([r for r, h in zip(right, have, strict=True) if h]))


def test_retrieval_counts_any_caption_of_a_picture(predictor: Predictor, place: Path, tmp_path: Path) -> None:
    for p in range(5):
        shutil.copy(place / f"{p}.png", tmp_path)
    pairs = [(p, c) for p in range(5) for c in "abc"]
    rows = [{"id": f"{p}{c}", "split": "test", "image": f"{p}.png", "text": f"picture {p}, {c}"} for p, c in pairs]
    manifest = write_manifest(tmp_path / "rows.csv", rows)
    found = evaluate(predictor, manifest, Retrieval(), None, resamples=100).metrics
    pictures = predictor.embed([{"image": place / f"{p}.png"} for p in range(5)], "image")
    texts = predictor.embed([{"text": row["text"]} for row in rows], "text")
    scores = pictures @ texts.T
    best = [min(int((scores[p] > scores[p, 3 * p + c]).sum()) + 1 for c in range(3)) for p in range(5)]
    back = [int((scores[:, i] > scores[i // 3, i]).sum()) + 1 for i in range(15)]
    assert found["i2t_r@1"].value == pytest.approx(np.mean(np.array(best) <= 1))
    assert found["i2t_mrr"].value == pytest.approx(np.mean(1 / np.array(best)))
    assert found["i2t_median_rank"].value == np.median(best)
    assert found["t2i_r@1"].value == pytest.approx(np.mean(np.array(back) <= 1))
    recalls = [found[f"{d}_r@{k}"].value for d in ("i2t", "t2i") for k in (1, 5, 10)]
    assert found["mean_recall"].value == pytest.approx(np.mean(recalls))
    assert found["mean_recall"].low <= found["mean_recall"].value <= found["mean_recall"].high


def test_zero_shot_is_the_nearest_sentence(predictor: Predictor, place: Path) -> None:
    task = ZeroShot(templates=("a {}", "the {}."))
    found = evaluate(predictor, place / "rows.csv", task, None, resamples=20).metrics
    classes = class_vectors(
        lambda texts: predictor.embed([{"text": t} for t in texts], "text"), sorted(NAMES), task.templates
    )
    manifest = predictor.manifest(place / "rows.csv", labelled=False)
    with_picture = [i for i in range(28) if manifest.inputs["image"][i] is not None]
    pictures = predictor.embed([{"image": place / f"{i}.png"} for i in with_picture], "image")
    right = (pictures @ classes.T).argmax(1) == torch.tensor([i % 7 for i in with_picture])
    assert found["acc"].value == pytest.approx(right.float().mean().item())


def test_says_what_cannot_be_judged(predictor: Predictor, place: Path, tmp_path: Path) -> None:
    plain = mmformer.load(save(tmp_path / "run", run_config()))
    with pytest.raises(ValueError, match="retrieval needs heads of two modalities, this model has heads for label"):
        evaluate(plain, place / "rows.csv", Retrieval())
    with pytest.raises(ValueError, match="zero-shot classes need heads for text and for another modality"):
        evaluate(plain, place / "rows.csv", ZeroShot())
    with pytest.raises(ManifestError, match="trained for label, and no such column is there"):
        evaluate(
            predictor,
            write_manifest(tmp_path / "rows.csv", [{"id": "a", "split": "test", "text": "x"}]),
            Classification(),
            None,
        )


def run(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


def test_the_command_writes_json_a_table_and_a_page(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(judge, "standard", two_strengths)
    words = ("evaluate", place / "run", "--data", place / "rows.csv", "--resamples", 20, "--robustness")
    code, out, errors = run(capsys, *words, "-o", tmp_path / "out")
    assert code == 0, errors
    assert [line.split()[0] for line in out.splitlines()] == ["acc", "nll", "ece"]
    assert "blur of image" in errors
    found = json.loads((tmp_path / "out" / JSON).read_text())
    assert found["facts"]["task"] == "classify"
    assert out.split()[1] == f"{found['metrics']['acc']['value']:.4g}"
    assert [point["strength"] for point in found["curves"][0]["points"]] == [0.5, 8]
    page = (tmp_path / "out" / PAGE).read_text()
    assert page.count("<polyline") == len(found["curves"])
    assert "http" not in page
    assert str(tmp_path / "out" / PAGE) in errors


def test_the_command_says_what_is_wrong(place: Path, capsys) -> None:
    cases = {
        ("--template", "a {}"): "--template and --source go with --task zeroshot, not with classify",
        ("--split", "tes"): "no split 'tes': the splits are",
        ("--target", "colour"): "trained for label, and no such column",
        ("--task", "zeroshot", "--template", "a photo"): "template 'a photo' has no place for the name",
    }
    for words, message in cases.items():
        code, _, errors = run(capsys, "evaluate", place / "run", "--data", place / "rows.csv", *words)
        assert code == 2, errors
        assert message in errors
    code, out, _ = run(capsys, "evaluate", place / "run", "--data", place / "rows.csv", "--task", "retrieval", "--json")
    assert code == 0
    assert json.loads(out)["headline"] == "mean_recall"
