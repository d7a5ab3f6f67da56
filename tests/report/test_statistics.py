from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from mmformer.report.statistics import bootstrap_mean, calibration_error, confusion, majority


def slow_bootstrap(scores: np.ndarray, resamples: int = 4000) -> tuple[float, float]:
    random = np.random.default_rng(1)
    means = [random.choice(scores, len(scores)).mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("many_values", [False, True])
def test_the_interval_is_that_of_resampling_by_hand(many_values):
    random = np.random.default_rng(0)
    scores = random.exponential(size=300) if many_values else (random.random(300) < 0.8).astype(float)
    assert bootstrap_mean(scores) == pytest.approx(slow_bootstrap(scores), abs=0.015)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high = bootstrap_mean(random.random(400) < 0.7)
        held += low <= 0.7 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_scores_without_spread_and_without_any():
    assert bootstrap_mean(np.ones(5)) == (1.0, 1.0)
    with pytest.raises(ValueError, match="0 scores"):
        bootstrap_mean(np.empty(0))


def test_confusion_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    labels = ["a", "b", "c"]
    targets, said = random.choice(labels, 50).tolist(), random.choice(labels, 50).tolist()
    np.testing.assert_array_equal(confusion(targets, said, labels), confusion_matrix(targets, said, labels=labels))


def test_majority_is_taken_from_the_training_labels():
    assert majority(["a", "b", "b", "b"]) == ("b", 0.75)
    assert majority(["a", "b", "b", "b"], ["a", "a", "b"]) == ("a", 0.25)


def test_calibration_error_of_a_calibrated_and_of_a_boasting_model():
    random = np.random.default_rng(0)
    confidence = random.random(20_000)
    assert calibration_error(confidence, random.random(20_000) < confidence) < 0.02
    assert calibration_error(np.ones(10), np.zeros(10, dtype=bool)) == pytest.approx(1.0)
