"""One evaluation: the metrics of a task, by subset of the modalities, and under noise of growing strength."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmformer.batch import Batch
from mmformer.datasets.degrade import Degradation, standard
from mmformer.evaluate.data import Samples, with_all
from mmformer.evaluate.measure import Measure
from mmformer.evaluate.tasks import Task
from mmformer.metrics.bootstrap import RESAMPLES, Interval
from mmformer.predict import Predictor
from mmformer.tokens import LATENT
from mmformer.training.evaluation import subsets

Metrics = dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class Point:
    """The metrics at one strength of a degradation."""

    strength: float
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The metrics under one degradation; `clean` are those of the same rows without it."""

    name: str
    modality: str
    strength: str
    clean: Metrics
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation found. `facts` say of what: run, data, split, task, numbers of samples and resamples."""

    headline: str
    metrics: Metrics
    subsets: dict[str, Metrics] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def evaluate(
    predictor: Predictor,
    path: Path | str,
    task: Task,
    split: str | None = "test",
    *,
    robustness: bool = False,
    resamples: int = RESAMPLES,
    tell: Callable[[str], None] = lambda line: None,
) -> Evaluated:
    """Judge a model on a split of a manifest (None: on all of it), each number with its 95 % bootstrap interval.

    `robustness` adds every subset of the modalities and every degradation of `datasets.degrade.standard`; `tell` is
    called with a line of progress.

    Raises:
        ManifestError: no such file or split, or it lacks what the task needs.
        ValueError: no sample can be judged.
    """
    manifest = predictor.manifest(path, labelled=True)
    held = {name: feature for name, feature in predictor.features.items() if name in manifest.modalities}
    manifest.require(*(held or predictor.features))
    samples = Samples(
        manifest=manifest,
        split=split,
        features=held,
        targets=task.targets(predictor, manifest),
        batch_size=predictor.batch_size,
    )

    def judge(batches: Iterable[Batch]) -> Metrics:
        found: Mapping[str, Measure] = task.judge(predictor, manifest, batches)
        return {name: measure.interval(resamples) for name, measure in found.items()}

    metrics = judge(samples.batches())
    if not metrics:
        raise ValueError(f"{path}: no row of split {split or 'all'} has what is to be judged and can be read")
    parts = _by_subset(predictor, samples, judge, tell) if robustness and task.by_subset else {}
    curves = tuple(_curves(samples, judge, tell)) if robustness else ()
    facts = {"data": str(path), "split": split or "all", "rows": len(manifest.rows(split)), "resamples": resamples}
    first = task.headline if task.headline in metrics else next(iter(metrics))
    return Evaluated(headline=first, metrics=metrics, subsets=parts, curves=curves, facts=facts)


def _by_subset(
    predictor: Predictor,
    samples: Samples,
    judge: Callable[[Iterable[Batch]], Metrics],
    tell: Callable[[str], None],
) -> dict[str, Metrics]:
    """The metrics of every subset of the modalities that the fusion can work on, of the samples that have all of it."""
    found = {}
    fusion = predictor.model.fusion
    for letter, names in subsets(list(samples.features)).items():
        if fusion is not None and not {LATENT, *names}.intersection(fusion.stream):
            continue
        tell(f"with {', '.join(names)} only")
        parts = (with_all(batch, names) for batch in samples.batches())
        if metrics := judge(part for part in parts if part is not None):
            found[letter] = metrics
    return found


def _curves(
    samples: Samples, judge: Callable[[Iterable[Batch]], Metrics], tell: Callable[[str], None]
) -> Iterator[Curve]:
    """The metrics under every degradation of a modality that there is."""
    clean: dict[str, Metrics] = {}
    for one in standard(samples.recordings()):
        if one.modality not in samples.features:
            continue
        if one.modality not in clean:
            clean[one.modality] = judge(samples.degraded(_nothing(one), 0.0))
        if not clean[one.modality]:
            continue
        tell(f"{one.name} of {one.modality}")
        points = [Point(strength=s, metrics=judge(samples.degraded(one, s))) for s in one.strengths]
        yield Curve(
            name=one.name, modality=one.modality, strength=one.strength, clean=clean[one.modality], points=tuple(points)
        )


def _nothing(one: Degradation) -> Degradation:
    """No harm, decoded and read as with it: what the curves start from."""
    return Degradation(
        name="none", modality=one.modality, strength="", strengths=(), apply=lambda value, strength, id: value
    )
