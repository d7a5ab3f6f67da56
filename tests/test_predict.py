from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import mmformer
from mmformer.checkpoints import build, save_model
from mmformer.datasets.dataset import ManifestDataset
from mmformer.datasets.manifest import read_manifest
from mmformer.datasets.tokenizers import ByteTokenizer
from mmformer.predict import Predictor
from mmformer.training.evaluation import Evaluation
from tests.checkpoints.configs import NAMES, run_config
from tests.helpers import scramble
from tests.report.runs import picture_file, sound_file

SUBSETS = ["text", "image", "audio", "text image", "text audio", "image audio", "text image audio"]


def write_media(folder: Path, count: int = 21) -> list[dict[str, str]]:
    """Rows of a manifest of every subset of the modalities, and their files."""
    rows = []
    for i in range(count):
        have = SUBSETS[i % 7].split()
        row = {"id": f"r{i}", "split": ("train", "test")[i % 2], "label": NAMES[i % 7], "text": f"what, {i}?"}
        row |= {"image": f"{i}.png", "audio": f"{i}.wav"}
        (folder / f"{i}.png").write_bytes(picture_file(i, (12 + i, 14)))
        (folder / f"{i}.wav").write_bytes(sound_file(i, 0.1 + 0.02 * i))
        rows.append({k: v for k, v in row.items() if k in have or k in ("id", "split", "label")})
    return rows


def write_manifest(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "split", "text", "image", "audio", "label"], restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def save(folder: Path, config: dict, **options) -> Path:
    """A run folder with a model of that config, its parameters random."""
    model = scramble(build(config["model"]))
    objectives = {name: build(part) for name, part in config["objectives"].items()}
    save_model(folder / "model", model, config, ByteTokenizer(), objectives, **options)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    write_manifest(folder / "rows.csv", write_media(folder))
    save(folder / "run", run_config())
    return folder


@pytest.fixture(scope="module")
def predictor(place) -> Predictor:
    return mmformer.load(place / "run")


def sample(place: Path, i: int = 6) -> dict:
    return {"text": f"what, {i}?", "image": place / f"{i}.png", "audio": place / f"{i}.wav"}


def shares(found: dict[str, float]) -> np.ndarray:
    return np.array(list(found.values()))


def test_a_manifest_gives_what_evaluation_in_training_gives(place, predictor):
    data = ManifestDataset(read_manifest(place / "rows.csv"), None, predictor.features)
    batch = data.__getitems__([(0, i) for i in range(len(data))])
    with torch.inference_mode():
        logits = predictor.objectives["label"].predict(predictor.model, predictor.model.encode(batch), batch)["logits"]
    answers = predictor.answer(place / "rows.csv")
    assert [answer.id for answer in answers] == list(batch.ids)
    assert [answer.prediction for answer in answers] == [NAMES[i] for i in logits.argmax(1)]
    np.testing.assert_allclose([shares(a.probabilities) for a in answers], logits.softmax(1), atol=1e-5)
    assert np.std([shares(a.probabilities) for a in answers], axis=0).max() > 0.01, "a constant model proves nothing"


def test_a_fresh_process_says_the_same(place, predictor):
    code = "import mmformer, sys, json; print(json.dumps(mmformer.load(sys.argv[1]).predict_proba(sys.argv[2])))"
    command = [sys.executable, "-c", code, str(place / "run"), str(place / "rows.csv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = predictor.predict_proba(place / "rows.csv")
    for one, other in zip(json.loads(done.stdout), wanted, strict=True):
        np.testing.assert_allclose(shares(one), shares(other), atol=1e-6)


def test_a_sample_does_not_depend_on_its_company_or_the_batch_size(place, predictor):
    samples = [sample(place, i) for i in range(7)] + [{"text": "alone"}]
    together = predictor.predict_proba(samples)
    small = Predictor(predictor.model, predictor.objectives, predictor.features, predictor.targets, batch_size=3)
    for one, other, whole in zip(samples, small.predict_proba(samples), together, strict=True):
        np.testing.assert_allclose(shares(predictor.predict_proba(one)), shares(whole), atol=1e-5)
        np.testing.assert_allclose(shares(other), shares(whole), atol=1e-5)
    assert predictor.predict(samples) == [max(found, key=found.get) for found in together]
    assert predictor.predict(samples[0]) == predictor.predict(samples)[0]


def test_a_picture_is_the_same_as_a_path_bytes_pil_or_array(place, predictor):
    path = place / "6.png"
    wanted = shares(predictor.predict_proba({"image": path}))
    pixels = np.asarray(Image.open(path))
    for value in [
        str(path),
        path.read_bytes(),
        Image.open(path),
        pixels,
        torch.from_numpy(pixels.copy()),
        pixels / 255,
    ]:
        np.testing.assert_allclose(shares(predictor.predict_proba({"image": value})), wanted, atol=1e-6)


def test_a_sound_is_the_same_as_a_path_bytes_or_array_with_its_rate(place, predictor):
    path = place / "6.wav"
    wanted = shares(predictor.predict_proba({"audio": path}))
    samples, rate = soundfile.read(path, dtype="float32")
    for value in [str(path), path.read_bytes(), (samples, rate), (torch.from_numpy(samples), rate)]:
        np.testing.assert_allclose(shares(predictor.predict_proba({"audio": value})), wanted, atol=1e-5)


def test_what_is_none_or_nan_is_absent(predictor):
    wanted = predictor.predict_proba({"text": "hello"})
    assert predictor.predict_proba({"text": "hello", "image": None, "audio": float("nan"), "id": "x"}) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"img": "a.png"}, "sample 0 has the key 'img': this model takes text, image, audio"),
        ({}, "sample 0 is empty: give at least one of text, image, audio"),
        ({"id": "x", "text": None}, "sample 0 is empty"),
        ([{"text": "a"}, {"image": "nowhere.png"}], "sample 1, image nowhere.png: no such file"),
        ([{"text": "a"}, "b"], "sample 1 is a str: give a dict"),
        ({"image": b"not a picture"}, "sample 0, image .*not a whole picture"),
    ],
)
def test_a_wrong_sample_is_named(predictor, given, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(given)


def test_a_broken_row_of_a_manifest_costs_only_what_is_broken(place, predictor, tmp_path):
    rows = [
        {"id": "whole", "text": "hello", "image": str(place / "6.png")},
        {"id": "half", "text": "hello", "image": "nowhere.png"},
        {"id": "gone", "image": "nowhere.png"},
        {"id": "none"},
    ]
    (tmp_path / "6.png").write_bytes((place / "6.png").read_bytes())
    rows[0]["image"] = "6.png"
    whole, half, gone, none = predictor.answer(write_manifest(tmp_path / "rows.csv", rows))
    assert (whole.id, whole.fault) == ("whole", None)
    np.testing.assert_allclose(
        shares(half.probabilities), shares(predictor.predict_proba({"text": "hello"})), atol=1e-6
    )
    assert half.fault == "image nowhere.png: no such file"
    assert (gone.prediction, gone.fault) == (None, "image nowhere.png: no such file")
    assert (none.prediction, none.fault) == (None, "nothing that the model reads")
    assert predictor.predict(tmp_path / "rows.csv")[2:] == [None, None]
    assert predictor.embed(tmp_path / "rows.csv").isnan().all(1).tolist() == [False, False, True, True]


def test_evaluate_gives_the_metrics_of_training(place, predictor):
    data = ManifestDataset(read_manifest(place / "rows.csv"), "test", predictor.features)
    evaluation = Evaluation(predictor.objectives, list(predictor.model.encoders), by_subset=True)
    for start in range(0, len(data), 4):
        batch = data.__getitems__([(0, i) for i in range(start, min(start + 4, len(data)))])
        with torch.inference_mode():
            encoded = predictor.model.encode(batch)
            evaluation.update(list(evaluation.judge(predictor.objectives, predictor.model, encoded, batch)))
    found = predictor.evaluate(place / "rows.csv")
    assert found == pytest.approx(evaluation.compute())
    assert {"acc", "f1", "acc_t", "acc_ia", "acc_tia"} <= set(found)


def test_embeddings_are_what_the_heads_read(place, predictor):
    samples = [sample(place, 6), {"text": "alone"}]
    vectors = predictor.embed(samples)
    with torch.inference_mode():
        logits = predictor.model.heads["label"](vectors)
    np.testing.assert_allclose(logits.softmax(1)[0], shares(predictor.predict_proba(samples[0])), atol=1e-5)
    assert torch.equal(predictor.embed(samples[1]), vectors[1]) or torch.allclose(
        predictor.embed(samples[1]), vectors[1], atol=1e-5
    )
    pictures = predictor.embed(samples, modality="image")
    assert pictures.isnan().all(1).tolist() == [False, True]
    with pytest.raises(ValueError, match="no modality 'smell': this model has text, image, audio"):
        predictor.embed(samples, modality="smell")


def other_kind(objective: dict, outputs: int = 7) -> dict:
    config = run_config(num_classes=outputs)
    names = NAMES if outputs == len(NAMES) else []
    config["facts"] = {"targets": {"label": {"kind": objective["_target_"].split(".")[-1], "names": names}}}
    config["objectives"] = {"label": {"head": "label", "target": "label"} | objective}
    return config


def test_several_labels_come_as_lists(tmp_path):
    run = save(tmp_path, other_kind({"_target_": "mmformer.objectives.Labels"}))
    predictor = mmformer.load(run)
    found, chances = predictor.predict({"text": "hello"}), predictor.predict_proba({"text": "hello"})
    assert found == [name for name, share in chances.items() if share > 0.5]
    assert found


def test_a_number_comes_on_its_own_scale(tmp_path):
    config = other_kind({"_target_": "mmformer.objectives.Number"}, outputs=1)
    config["model"]["heads"]["label"] |= {"mean": 100.0, "std": 2.0}
    predictor = mmformer.load(save(tmp_path, config))
    vector = predictor.embed({"text": "hello"})
    with torch.inference_mode():
        wanted = float(predictor.model.heads["label"].out(vector[None])) * 2 + 100
    assert predictor.predict({"text": "hello"}) == pytest.approx(wanted, abs=1e-3)
    with pytest.raises(ValueError, match="predicts a number, which has no probabilities"):
        predictor.predict_proba({"text": "hello"})


def test_a_model_for_retrieval_embeds_by_its_heads(tmp_path, place):
    config = run_config()
    head = {"_target_": "mmformer.heads.UnitHead", "dim": 24, "num_outputs": 8}
    config["model"]["heads"] = {"image": head, "audio": dict(head)}
    config["objectives"] = {
        "match": {
            "_target_": "mmformer.objectives.Contrastive", "modalities": ["image", "audio"], "scale": 5.0,
            "loss": {"_target_": "mmformer.objectives.info_nce", "_partial_": True},
        }
    }  # fmt: skip
    predictor = mmformer.load(save(tmp_path, config))
    vector = predictor.embed(sample(place), modality="audio")
    assert vector.shape == (8,)
    assert float(vector.norm()) == pytest.approx(1)
    with pytest.raises(ValueError, match="trained for match, which have no labels: use embed"):
        predictor.predict(sample(place))


def test_load_opens_a_run_a_folder_and_a_file(place, predictor):
    wanted = predictor.predict_proba({"text": "hello"})
    for where in ["run", "run/model", "run/model/model.safetensors"]:
        assert mmformer.load(str(place / where)).predict_proba({"text": "hello"}) == wanted


def test_what_cannot_be_opened_is_named(place, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: `mmformer runs` lists"):
        mmformer.load(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"training did not finish: python train\.py resume="):
        mmformer.load(tmp_path)
    with pytest.raises(ValueError, match=r"rows\.csv is no trained model"):
        mmformer.load(place / "rows.csv")
    with pytest.raises(FileNotFoundError, match=r"model is missing: give the folder of a run"):
        mmformer.load(place.parent)
