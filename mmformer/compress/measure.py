"""What runs and exported files cost and how well they do, side by side: `mmformer bench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from mmformer.compress.opened import Opened, OpenedRun, Outputs, Samples
from mmformer.compress.peak import peak_memory
from mmformer.datasets.labels import Target
from mmformer.export.check import rows_of
from mmformer.metrics.retrieval import first_ranks
from mmformer.metrics.tagging import mean_average_precision
from mmformer.predict import Predictor
from mmformer.training.evaluation import subsets

SIZES = (1, 8)
"""Samples of one call whose time is measured."""
VARIETY = 12
"""So many batches take turns, so that no one shape is all that is timed."""
RECALL = 10


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of processor time of one call, and samples a second at the median."""

    p50: float
    p95: float
    throughput: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run or file. `accuracy` is by subset of the modalities, as `metric` counts it, "" being rows as they are.

    `size` and `memory` are bytes, `operations` those of one sample with all modalities, `times` by the samples of a
    call. `difference` is the largest from the outputs of the first, in units of its largest where that is above 1.
    """

    name: str
    size: int
    parameters: int | None
    operations: float | None
    times: dict[int, Times]
    memory: int | None
    metric: str
    accuracy: dict[str, float]
    difference: float | None

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"times": {str(n): asdict(times) for n, times in self.times.items()}}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Raw samples with what they should be told to be, where the data say; `modalities` are those of the first run."""

    samples: Samples
    target: Tensor | None
    kind: str | None
    modalities: tuple[str, ...]

    def having(self, names: Sequence[str]) -> tuple[Samples, Tensor | None]:
        """The samples that have all of some modalities, and nothing else of them."""
        chosen = [i for i, sample in enumerate(self.samples) if set(names) <= sample.keys()]
        return [{name: self.samples[i][name] for name in names} for i in chosen], (
            None if self.target is None else self.target[chosen]
        )


def rows_to_judge(predictor: Predictor, manifest: Path, split: str | None = "test", count: int = 1000) -> Rows:
    """Up to `count` rows of a split of a manifest, evenly spread, with their labels where there are any."""
    samples = rows_of(predictor, manifest, split, count)
    held = predictor.manifest(manifest, labelled=True)
    target: Target | None = held.label
    found = None
    if target is not None and hasattr(next(iter(predictor.objectives.values()), None), "target"):
        place = {held.id(row): row for row in range(len(held))}
        found = target.rows(np.array([place[sample["id"]] for sample in samples]))
    kind = None if found is None or target is None else target.kind
    return Rows(samples=samples, target=found, kind=kind, modalities=tuple(predictor.features))


def data_of(run: Path) -> Path:
    """The manifest that a run was trained on, as its config says.

    Raises:
        FileNotFoundError: it does not say, or the data are not there.
    """
    config = (
        yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if (run / "config.yaml").is_file() else {}
    )
    named = (config.get("data") or {}).get("path")
    root = (config.get("paths") or {}).get("root", "")
    found = next((place for place in (Path(named), Path(root) / named) if place.exists()), None) if named else None
    if found is None:
        said = f"its data, {named}, are not there" if named else "it does not say what its data are"
        raise FileNotFoundError(f"{run} cannot be judged, as {said}: give rows to judge on (--data rows.csv)")
    return found


def measure(subjects: Sequence[Opened], rows: Rows, rounds: int = 60, *, memory: bool = True) -> list[Measured]:
    """Time all of them in turns on one thread, and judge each on the same rows; the first is what others differ from.

    Times are of samples that have all modalities of the first, as far as there are such, after reading them.

    Raises:
        ValueError: nothing to measure, or no rows.
    """
    if not subjects or not rows.samples:
        raise ValueError(f"{len(subjects)} things to measure on {len(rows.samples)} rows: give at least one of both")
    full = rows.having(rows.modalities)[0] or rows.samples
    with _one_thread():
        times = [_times(subjects, full, size, rounds) for size in SIZES]
    said = [subject.outputs(rows.samples) for subject in subjects]
    metric = "recall@10" if rows.kind is None else {"Classes": "acc", "Labels": "map", "Number": "mae"}[rows.kind]
    out = []
    for i, subject in enumerate(subjects):
        count = subject.operations(full[:8])
        out.append(
            Measured(
                name=str(subject.path),
                size=subject.size,
                parameters=subject.parameters,
                operations=None if count is None else count / len(full[:8]),
                times=dict(zip(SIZES, (part[i] for part in times), strict=True)),
                memory=peak_memory(subject.path, full[0]) if memory else None,
                metric=metric,
                accuracy={"": judge(said[i], rows.target, rows.kind)} | by_subset(subject, rows),
                difference=_difference(said[0], said[i]),
            )
        )
    return out


def by_subset(subject: Opened, rows: Rows) -> dict[str, float]:
    """How well it does on the samples that have all of a subset of the modalities, and nothing else of them.

    Of embeddings only pairs of modalities say something.
    """
    found = {}
    for letters, names in subsets(rows.modalities).items():
        samples, target = rows.having(names)
        if samples and (rows.kind is not None or len(names) > 1):
            found[letters] = judge(subject.outputs(samples), target, rows.kind)
    return found


def judge(outputs: Outputs, target: Tensor | None, kind: str | None) -> float:
    """Accuracy, mean average precision, mean absolute error, or how often a partner is among the nearest ten."""
    if kind is None or target is None:
        return _recall(outputs)
    if kind == "Number":
        known = ~target.isnan()
        return float((torch.from_numpy(outputs["value"])[known] - target[known]).abs().mean())
    logits = torch.from_numpy(outputs["logits"])
    if kind == "Labels":
        return mean_average_precision(logits, target)
    known = target >= 0
    return float((logits.argmax(1)[known] == target[known]).double().mean())


def _recall(outputs: Outputs) -> float:
    """Over every ordered pair of modalities, the share of samples whose own vector is among the ten nearest."""
    vectors: dict[str, Float[Tensor, "N D"]] = {name: torch.from_numpy(rows) for name, rows in outputs.items()}
    shares = []
    for one, other in combinations(vectors, 2):
        both = ~(vectors[one].isnan().any(1) | vectors[other].isnan().any(1))
        scores = vectors[one][both] @ vectors[other][both].T
        same = torch.eye(len(scores), dtype=torch.bool)
        shares += [float((first_ranks(s, same) <= RECALL).double().mean()) for s in (scores, scores.T) if len(scores)]
    return float(np.mean(shares)) if shares else float("nan")


def _difference(first: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float | None:
    """The largest between outputs of the same name and shape; None where there are none."""
    shared = [name for name in first if name in other and first[name].shape == other[name].shape]
    gaps = [
        float(np.nanmax(np.abs(first[name] - other[name])) / max(1.0, float(np.nanmax(np.abs(first[name])))))
        for name in shared
        if not np.isnan(first[name]).all()
    ]
    return max(gaps) if gaps else None


def _times(subjects: Sequence[Opened], samples: Samples, size: int, rounds: int) -> list[Times]:
    """Processor time of one call of each, taking turns in an order that is reversed every other round."""
    endless = cycle(samples)
    batches = [list(islice(endless, size)) for _ in range(VARIETY)]
    steps = [[subject.step(batch) for batch in batches] for subject in subjects]
    for own in steps:
        for step in own:
            step()
    seconds: list[list[float]] = [[] for _ in subjects]
    order = list(range(len(subjects)))
    for number in range(rounds):
        for i in order if number % 2 == 0 else reversed(order):
            seconds[i].append(_seconds(steps[i][number % VARIETY]))
    return [_summary(own, size) for own in seconds]


def _summary(seconds: Sequence[float], size: int) -> Times:
    p50, p95 = np.percentile(seconds, [50, 95])
    return Times(p50=1e3 * float(p50), p95=1e3 * float(p95), throughput=size / max(float(p50), 1e-9))


def _seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


@contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def first_run(subjects: Sequence[Opened]) -> Predictor | None:
    """The model of the first run among some, which knows how to read rows."""
    return next((subject.predictor for subject in subjects if isinstance(subject, OpenedRun)), None)
