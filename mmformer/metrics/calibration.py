"""Whether a model is right as often as it says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

BINS = 15


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Samples by how sure the model was, in bins of equal width from 0 to 1; an empty bin has 0 in all."""

    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]
    count: Int[Tensor, " bins"]


def reliability(confidence: Float[Tensor, " N"], right: Bool[Tensor, " N"], bins: int = BINS) -> Reliability:
    """The mean confidence and the share of right answers in each bin; bin b holds b / bins up to (b + 1) / bins."""
    place = (confidence.double() * bins).long().clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins)
    filled = count.clamp(min=1)
    return Reliability(
        confidence=torch.bincount(place, confidence.double(), bins) / filled,
        accuracy=torch.bincount(place, right.double(), bins) / filled,
        count=count,
    )


def expected_calibration_error(found: Reliability) -> float:
    """ECE: the gap between confidence and accuracy, the mean over samples (Guo et al., arXiv 1706.04599)."""
    gaps = (found.confidence - found.accuracy).abs() * found.count
    return float(gaps.sum() / found.count.sum())


def negative_log_likelihoods(probabilities: Float[Tensor, "N C"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Minus the logarithm of the probability of the right class, of each sample."""
    return -probabilities.gather(1, targets[:, None])[:, 0].log()


def brier_scores(probabilities: Float[Tensor, "N C"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The squared distance of the probabilities from the truth, summed over classes (Brier, 1950): 0 to 2."""
    return (probabilities - one_hot(targets, probabilities.shape[1])).square().sum(1)
