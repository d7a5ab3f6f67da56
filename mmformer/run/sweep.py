"""What the jobs of a sweep reached, in one table beside their folders."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode

FILE = "sweep.csv"
SEED = "seed"


class SweepTable(Callback):
    """Write a line to `sweep.csv` for every job of `python train.py -m ...`, and print them ranked at the end.

    What counts is `optimized_metric`. Jobs that differ in the seed alone are one line of what is printed, their mean.
    Hydra calls this; where no metric is optimised there is no table.
    """

    def __init__(self) -> None:
        self._metric: str | None = None
        self._mode: str | None = None

    def on_job_end(self, config: Any, job_return: JobReturn, **kwargs: Any) -> None:
        done = config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.COMPLETED
        if not done or job_return.return_value is None:
            return
        found: Any = job_return.cfg
        metric, monitor = found.optimized_metric, found.monitor
        known = metric.rpartition("/")[2] == monitor.rpartition("/")[2]
        self._metric, self._mode = metric, found.monitor_mode if known else None
        given = dict(word.split("=", 1) for word in job_return.overrides or ())
        _append(Path(config.hydra.sweep.dir), {"job": config.hydra.job.num} | given | {metric: job_return.return_value})

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        file = Path(config.hydra.sweep.dir) / FILE
        if self._metric is None:
            return
        with file.open(newline="", encoding="utf-8") as lines:
            jobs = list(csv.DictReader(lines))
        print(f"\n{self._metric} of {len(jobs)} runs, {'best first' if self._mode else 'in their order'}")
        for name, scores in ranked(jobs, self._metric, self._mode):
            spread = f" \u00b1 {statistics.stdev(scores):.4f} over {len(scores)} seeds" if len(scores) > 1 else ""
            print(f"  {statistics.fmean(scores):.4f}{spread}  {name}")
        print(f"sweep       {file}")


def _append(folder: Path, row: Mapping[str, Any]) -> None:
    file = folder / FILE
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def ranked(jobs: Sequence[Mapping[str, str]], metric: str, mode: str | None) -> list[tuple[str, list[float]]]:
    """What the jobs were given that differs between them, but for the seed, with the metric of each seed.

    The best mean comes first: the largest with mode "max", the smallest with "min"; with None, the order is kept.
    """
    differ = [key for key in jobs[0] if key not in ("job", SEED, metric) and len({job[key] for job in jobs}) > 1]
    groups: dict[str, list[float]] = {}
    for job in jobs:
        groups.setdefault(" ".join(f"{key}={job[key]}" for key in differ), []).append(float(job[metric]))
    sign = {"max": -1, "min": 1, None: 0}[mode]
    return sorted(groups.items(), key=lambda group: sign * statistics.fmean(group[1]))
