"""mAP of tags is scikit-learn's and torchmetrics'."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import average_precision_score
from torchmetrics.classification import MultilabelAveragePrecision

from mmformer.metrics.tagging import average_precision_by_class, mean_average_precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_references(dtype: torch.dtype) -> None:
    targets = (torch.rand(40, 5) < 0.3).float()
    targets[0] = 1  # no class is empty, on which the two libraries differ
    scores = torch.rand(40, 5).to(dtype)  # bfloat16 has ties
    by_class = average_precision_by_class(scores, targets)
    theirs = [average_precision_score(targets[:, c], scores[:, c].float()) for c in range(5)]
    torch.testing.assert_close(by_class, torch.tensor(theirs, dtype=torch.float64))
    macro = MultilabelAveragePrecision(num_labels=5)(scores.float(), targets.long())
    torch.testing.assert_close(mean_average_precision(scores, targets), macro.item())


def test_what_is_unknown_is_left_out() -> None:
    scores, targets = torch.rand(9, 3), (torch.rand(9, 3) < 0.5).float()
    targets[:, 2] = 0
    extra = torch.full((1, 3), torch.nan)
    together = average_precision_by_class(torch.cat([scores, torch.ones(1, 3)]), torch.cat([targets, extra]))
    alone = average_precision_by_class(scores, targets)
    torch.testing.assert_close(together, alone, equal_nan=True)
    targets[4, 0] = torch.nan
    kept = torch.arange(9) != 4
    first = average_precision_by_class(scores, targets)[0]
    torch.testing.assert_close(first, average_precision_by_class(scores[kept], targets[kept])[0])
    assert math.isnan(alone[2])
    assert math.isnan(mean_average_precision(scores, torch.zeros(9, 3)))
