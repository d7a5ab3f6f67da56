"""How sure a number is: what it would have been on other samples of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Shaped

Rows = Shaped[np.ndarray, "N ..."]
Statistic = Callable[[np.ndarray], float]
"""A number of some samples, one row each: the mean of scores, or a ratio of sums such as an error rate."""

RESAMPLES = 1000
_FEW = 64


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number and where it lies at some level of confidence."""

    value: float
    low: float
    high: float


def mean(rows: np.ndarray) -> float:
    """The statistic of most metrics, which are means of a score of each sample."""
    return float(rows.mean())


def percentile_interval(
    rows: Rows, statistic: Statistic = mean, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The middle `level` of the statistic over samples drawn from these with replacement (Efron, 1979).

    Raises:
        ValueError: no rows.
    """
    return _interval(statistic(rows), resampled(rows, statistic, resamples, seed), (1 - level) / 2, (1 + level) / 2)


def bca_interval(
    rows: Rows, statistic: Statistic = mean, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The percentiles corrected for bias and for skew (Efron, 1987): for numbers near an end of their range.

    It takes the statistic once more for each row left out. Where all rows say the same, the interval is that point.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} rows: leaving one out must leave one, give at least 2")
    value, found = statistic(rows), resampled(rows, statistic, resamples, seed)
    normal = NormalDist()
    below = ((found < value).mean() + (found <= value).mean()) / 2
    if below in (0.0, 1.0):
        return _interval(value, found, (1 - level) / 2, (1 + level) / 2)
    bias = normal.inv_cdf(float(below))
    left_out = np.array([statistic(np.delete(rows, i, axis=0)) for i in range(len(rows))])
    gap = left_out.mean() - left_out
    spread = float((gap**2).sum())
    skew = float((gap**3).sum()) / (6 * spread**1.5) if spread else 0.0

    def corrected(tail: float) -> float:
        z = bias + normal.inv_cdf(tail)
        return normal.cdf(bias + z / (1 - skew * z))

    return _interval(value, found, corrected((1 - level) / 2), corrected((1 + level) / 2))


def paired_difference(
    a: Shaped[np.ndarray, "N ..."],
    b: Shaped[np.ndarray, "M ..."],
    statistic: Statistic = mean,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """How much higher `b` is than `a` on the same samples, which are drawn together: 0 outside is a difference.

    Raises:
        ValueError: unlike numbers of rows, or none.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} rows: a pair needs the same samples in both, in one order")
    both = np.stack([a, b], axis=1)

    def difference(rows: np.ndarray) -> float:
        return statistic(rows[:, 1]) - statistic(rows[:, 0])

    return percentile_interval(both, difference, level=level, resamples=resamples, seed=seed)


def resampled(
    rows: Rows, statistic: Statistic = mean, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, " resamples"]:
    """The statistic of `resamples` samples, each as large as this one and drawn from it with replacement.

    The mean of few distinct scores (right or wrong) is drawn by their counts: the same distribution at a cost that
    does not grow with N.
    """
    if not len(rows):
        raise ValueError("0 rows: there is nothing to draw from, give at least one")
    random = np.random.default_rng(seed)
    if statistic is mean and rows.ndim == 1:
        values, counts = np.unique(rows, return_counts=True)
        if len(values) <= _FEW:
            return random.multinomial(len(rows), counts / len(rows), resamples) @ values / len(rows)
    return np.array([statistic(rows[random.integers(0, len(rows), len(rows))]) for _ in range(resamples)])


def _interval(value: float, found: Float[np.ndarray, " resamples"], low: float, high: float) -> Interval:
    ends = np.quantile(found, [low, high])
    return Interval(value=value, low=float(ends[0]), high=float(ends[1]))
