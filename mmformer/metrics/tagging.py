"""Tags, of which a sample has any number: mean average precision, as for AudioSet."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmformer.metrics.retrieval import average_precisions


def average_precision_by_class(scores: Float[Tensor, "N C"], targets: Float[Tensor, "N C"]) -> Float[Tensor, " C"]:
    """The average precision of each class over the samples; NaN for a class that no sample has.

    `targets` are 1 and 0, and NaN where a sample is not known to have the class, which leaves it out for that class.
    Samples of one score are cut off together, as by scikit-learn.
    """
    wanted = targets.T > 0.5
    # What is unknown comes last, where it counts for no precision.
    found = average_precisions(scores.T.float().masked_fill(targets.T.isnan(), -torch.inf), wanted)
    return torch.where(wanted.any(1), found, torch.nan)


def mean_average_precision(scores: Float[Tensor, "N C"], targets: Float[Tensor, "N C"]) -> float:
    """mAP: the mean over the classes that some sample has; NaN where there is none."""
    return float(average_precision_by_class(scores, targets).nanmean())
