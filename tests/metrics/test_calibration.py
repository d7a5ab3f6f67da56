"""Calibration errors are torchmetrics' and scikit-learn's."""

from __future__ import annotations

import torch
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.classification import MulticlassCalibrationError

from mmformer.metrics.calibration import (
    brier_scores,
    expected_calibration_error,
    negative_log_likelihoods,
    reliability,
)


def test_equals_references() -> None:
    probabilities, targets = (2 * torch.randn(300, 4)).softmax(1), torch.randint(4, (300,))
    confidence, said = probabilities.max(1)
    found = reliability(confidence, said == targets, bins=10)
    theirs = MulticlassCalibrationError(num_classes=4, n_bins=10)(probabilities, targets)
    torch.testing.assert_close(expected_calibration_error(found), theirs.item(), rtol=1e-5, atol=1e-6)
    assert found.count.sum() == 300
    likelihood = negative_log_likelihoods(probabilities, targets).mean().item()
    shares = probabilities.double().numpy()
    theirs = log_loss(targets.numpy(), shares / shares.sum(1, keepdims=True), labels=range(4))
    torch.testing.assert_close(likelihood, theirs, rtol=1e-5, atol=0)
    binary = torch.stack([1 - confidence, confidence], 1)
    right = (said == targets).long()
    ours = brier_scores(binary, right).mean().item()
    torch.testing.assert_close(ours, 2 * brier_score_loss(right, confidence), rtol=1e-5, atol=0)


def test_the_ends_of_the_range_have_their_bins() -> None:
    found = reliability(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([False, True, False]), bins=5)
    assert found.count.tolist() == [1, 0, 0, 0, 2]
    assert found.accuracy.tolist() == [0, 0, 0, 0, 0.5]
    torch.testing.assert_close(expected_calibration_error(found), 1 / 3)
