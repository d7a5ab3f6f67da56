"""How sure a number is, and what a model that has learnt nothing would reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

RESAMPLES = 1000


def bootstrap_mean(
    scores: Float[np.ndarray, " N"] | Bool[np.ndarray, " N"], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean: resample the samples with replacement, `RESAMPLES` times.

    Scores of few distinct values (right or wrong) are resampled by their counts, which is the same distribution at a
    cost that does not grow with N.

    Raises:
        ValueError: no scores.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not len(scores):
        raise ValueError("0 scores have no mean: give at least one")
    values, counts = np.unique(scores, return_counts=True)
    random = np.random.default_rng(seed)
    if len(values) <= 64:
        means = random.multinomial(len(scores), counts / len(scores), RESAMPLES) @ values / len(scores)
    else:
        means = np.array([scores[random.integers(0, len(scores), len(scores))].mean() for _ in range(RESAMPLES)])
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def majority(targets: Sequence[Hashable], known: Sequence[Hashable] | None = None) -> tuple[Hashable, float]:
    """The most frequent target among `known` (the training labels; the targets themselves where None), and the share
    of `targets` that saying it always would get right."""
    most = Counter(targets if known is None else known).most_common(1)[0][0]
    return most, sum(target == most for target in targets) / len(targets)


def confusion(targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> Int[np.ndarray, "C C"]:
    """How often each label (row) was answered with each (column)."""
    place = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
    rows, columns = [place[t] for t in targets], [place[p] for p in predictions]
    np.add.at(counts, (rows, columns), 1)
    return counts


def calibration_error(confidence: Float[np.ndarray, " N"], right: Bool[np.ndarray, " N"], bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017): the mean gap between confidence and accuracy over equal bins."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(place, confidence - right, bins)
    return float(np.abs(gap).sum() / len(confidence))
