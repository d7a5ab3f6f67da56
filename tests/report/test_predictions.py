from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from mmformer.report import Answers, read_predictions, write_predictions
from mmformer.report.predictions import sample_losses

IDS = ("a", "b", "c", "d")
LABELS = ["red", "green", "blue"]


def classes(seed: int = 0) -> Answers:
    logits = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
    return Answers(ids=IDS, outputs=logits, targets=np.array([0, 2, -100, 1]))


def test_losses_are_those_of_torch():
    found = classes()
    wanted = F.cross_entropy(torch.from_numpy(found.outputs), torch.from_numpy(found.targets), reduction="none")
    losses = sample_losses(found)
    np.testing.assert_allclose(losses[[0, 1, 3]], wanted.numpy()[[0, 1, 3]], rtol=1e-5)
    assert np.isnan(losses[2])
    several = Answers(ids=IDS, outputs=found.outputs * 30, targets=np.eye(4, 3))
    wanted = F.binary_cross_entropy_with_logits(
        torch.from_numpy(several.outputs).double(), torch.eye(4, 3).double(), reduction="none"
    ).mean(1)
    np.testing.assert_allclose(sample_losses(several), wanted.numpy(), rtol=1e-5)


def test_one_label_of_several_comes_back(tmp_path):
    full, part = classes(), classes(1)
    part = Answers(ids=("d", "a"), outputs=part.outputs[:2], targets=np.array([1, 0]))
    rows = {"a": {"text": "hello", "kind": "x", "image": "a.png", "raw": b"\x00"}, "b": {"kind": "y", "loss": "mine"}}
    write_predictions(tmp_path, {"": full, "t": part}, LABELS, rows, {"c": "image: truncated"})
    said = read_predictions(tmp_path)
    assert said is not None
    assert (said.kind, said.labels, said.subsets, len(said)) == ("Classes", tuple(LABELS), ("t",), 4)
    assert said.column("target") == ["red", "blue", None, "green"]
    assert said.column("prediction") == [LABELS[i] for i in full.outputs.argmax(1)]
    of_d, of_a = (LABELS[i] for i in part.outputs.argmax(1))
    assert said.column("prediction_t") == [of_a, None, None, of_d]
    np.testing.assert_allclose(said.column("probabilities"), torch.from_numpy(full.outputs).softmax(1), rtol=1e-5)
    assert [best[0]["label"] for best in said.column("top")] == said.column("prediction")
    assert said.column("fault") == [None, None, "image: truncated", None]
    assert said.column("kind") == ["x", "y", None, None]
    assert said.extra == ("text", "kind", "image"), "raw bytes and columns that have a place already are left out"
    right = full.outputs.argmax(1) == full.targets
    np.testing.assert_array_equal(said.scores()[[0, 1, 3]], right[[0, 1, 3]])
    assert np.isnan(said.scores("t")[1])
    assert not list(tmp_path.glob(".*"))


def test_any_number_of_labels_come_back(tmp_path):
    outputs = np.array([[1.0, -1, 2], [-1, -1, -1]])
    targets = np.array([[1.0, 0, 1], [np.nan] * 3])
    write_predictions(tmp_path, {"": Answers(ids=("a", "b"), outputs=outputs, targets=targets)}, LABELS)
    said = read_predictions(tmp_path)
    assert said is not None
    assert said.column("prediction") == [["red", "blue"], []]
    assert said.column("target") == [["red", "blue"], None]
    assert said.scores()[0] == 1


def test_numbers_come_back_and_absent_answers_stay_absent(tmp_path):
    answers = Answers(
        ids=IDS,
        outputs=np.array([1.0, 2, 3, 4]),
        targets=np.array([1.5, np.nan, 3, 3]),
        present=np.array([True, True, True, False]),
    )
    write_predictions(tmp_path, {"": answers})
    said = read_predictions(tmp_path)
    assert said is not None
    assert said.column("prediction") == [1.0, 2.0, 3.0, None]
    np.testing.assert_array_equal(said.scores(), [0.5, np.nan, 0, np.nan])
    np.testing.assert_array_equal(said.column("loss"), np.float32([0.25, np.nan, 0, np.nan]))


def test_many_labels_keep_only_the_most_probable(tmp_path):
    outputs = np.random.default_rng(0).normal(size=(2, 300))
    answers = Answers(ids=("a", "b"), outputs=outputs, targets=np.array([0, 1]))
    path = write_predictions(tmp_path, {"": answers}, [str(i) for i in range(300)])
    table = pq.read_table(path)
    assert "probabilities" not in table.column_names
    assert [len(best) for best in table["top"].to_pylist()] == [5, 5]


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 outputs but 2 labels"):
        write_predictions(tmp_path, {"": classes()}, LABELS[:2])
    with pytest.raises(ValueError, match="only for subsets"):
        write_predictions(tmp_path, {"t": classes()}, LABELS)
    assert read_predictions(tmp_path) is None
    (tmp_path / "predictions.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"predictions\.parquet is damaged"):
        read_predictions(tmp_path)
