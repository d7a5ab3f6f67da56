"""Intervals are SciPy's, and cover the truth as often as they say."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy import stats

from mmformer.metrics.bootstrap import Interval, bca_interval, mean, paired_difference, percentile_interval, resampled
from mmformer.metrics.text import error_rate


@pytest.mark.parametrize(("interval", "method"), [(percentile_interval, "percentile"), (bca_interval, "BCa")])
def test_equals_scipy(interval: partial[Interval], method: str) -> None:
    rows = np.random.default_rng(0).exponential(size=80)  # skewed, so that the two methods differ
    theirs = stats.bootstrap((rows,), np.mean, n_resamples=20_000, method=method, rng=1).confidence_interval
    ours = interval(rows, resamples=20_000)
    assert ours.value == rows.mean()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


@pytest.mark.parametrize("interval", [percentile_interval, bca_interval])
def test_covers_the_truth_as_often_as_it_says(interval: partial[Interval]) -> None:
    random = np.random.default_rng(0)
    held = [interval(random.random(60) < 0.7, level=0.9, resamples=200, seed=i) for i in range(150)]
    covered = np.mean([found.low <= 0.7 <= found.high for found in held])
    assert 0.82 <= covered <= 0.97


def test_few_values_are_drawn_as_many_are() -> None:
    rows = (np.arange(200) < 150).astype(float)
    fast, slow = resampled(rows, resamples=4000), resampled(rows, lambda r: float(r.mean()), resamples=4000)
    assert fast.mean() == pytest.approx(slow.mean(), abs=2e-3)
    assert fast.std() == pytest.approx(slow.std(), rel=0.05)


def test_a_statistic_of_several_columns() -> None:
    counts = np.random.default_rng(0).integers(1, 9, (50, 2))
    found = percentile_interval(counts, error_rate)
    assert found.value == counts[:, 0].sum() / counts[:, 1].sum()
    assert found.low < found.value < found.high


def test_pairs_are_drawn_together() -> None:
    a = np.random.default_rng(0).normal(size=100) * 10
    found = paired_difference(a, a + 0.1)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert paired_difference(a, a[::-1].copy()).low < 0 < paired_difference(a, a[::-1].copy()).high
    counts = np.random.default_rng(0).integers(1, 9, (50, 2))
    assert paired_difference(counts, counts, error_rate).value == 0


def test_seeds_and_edges() -> None:
    rows = np.random.default_rng(0).random(30)
    assert percentile_interval(rows, seed=3) == percentile_interval(rows, seed=3)
    assert percentile_interval(rows, seed=3) != percentile_interval(rows, seed=4)
    assert bca_interval(np.ones(5)) == Interval(value=1.0, low=1.0, high=1.0)
    with pytest.raises(ValueError, match="0 rows"):
        percentile_interval(np.ones(0), lambda rows: 0.0)
    with pytest.raises(ValueError, match="1 rows: leaving one out"):
        bca_interval(np.ones(1))
    with pytest.raises(ValueError, match="3 and 4 rows"):
        paired_difference(np.ones(3), np.ones(4), mean)
