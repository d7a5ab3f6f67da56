"""Metrics that keep what they are made of, so that samples can be drawn again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

from mmformer.metrics.bootstrap import RESAMPLES, Interval, Statistic, mean, percentile_interval


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """A number of some samples, and of each what it is computed from."""

    rows: Shaped[np.ndarray, "N ..."]
    statistic: Statistic = mean

    def interval(self, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
        """The number with its 95 % interval over samples drawn from these; NaN where there is none."""
        if not len(self.rows):
            return Interval(value=np.nan, low=np.nan, high=np.nan)
        return percentile_interval(self.rows, self.statistic, resamples=resamples, seed=seed)
