"""What a model is judged for: classes and numbers, retrieval, classes it was never trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mmformer.batch import Batch
from mmformer.datasets.labels import Target
from mmformer.datasets.manifest import Manifest
from mmformer.datasets.tables import ManifestError
from mmformer.evaluate.data import joined
from mmformer.evaluate.measure import Measure
from mmformer.metrics.calibration import expected_calibration_error, negative_log_likelihoods, reliability
from mmformer.metrics.retrieval import RECALL_AT, first_ranks, judge_vectors
from mmformer.metrics.tagging import mean_average_precision
from mmformer.metrics.zeroshot import class_ranks, class_vectors
from mmformer.objectives import Objective
from mmformer.objectives.objective import letters
from mmformer.predict import Predictor


@runtime_checkable
class Task(Protocol):
    """A protocol: `headline` is the metric to lead with, `by_subset` whether subsets of the modalities make sense."""

    @property
    def headline(self) -> str: ...

    @property
    def by_subset(self) -> bool: ...

    def targets(self, predictor: Predictor, manifest: Manifest) -> dict[str, Target]:
        """Columns that the batches must bring as targets, beside the label."""
        ...

    def judge(self, predictor: Predictor, manifest: Manifest, batches: Iterable[Batch]) -> dict[str, Measure]:
        """The metrics by name over some samples; empty where none of them can be judged."""
        ...


@dataclass(frozen=True)
class Classification:
    """What the model was trained to say of each sample: a class, several, or a number.

    Classes have accuracy, the mean likelihood and the calibration error, tags the mean average precision, numbers the
    mean absolute and the root of the mean squared error. `target` chooses where it was trained for several.
    """

    target: str | None = None
    headline: str = "acc"
    by_subset: bool = True

    def targets(self, predictor: Predictor, manifest: Manifest) -> dict[str, Target]:
        """The column of the objective, unless it is the label, read as it was for the training."""
        name = self._objective(predictor, manifest)[1]
        known = predictor.targets[name]
        return {} if name == "label" else {name: manifest.read_target(name, known["kind"], known["names"] or None)}

    def judge(self, predictor: Predictor, manifest: Manifest, batches: Iterable[Batch]) -> dict[str, Measure]:
        """Of the samples that have the target and something to read."""
        objective, name = self._objective(predictor, manifest)
        outputs, wanted = [], []
        for encoded, batch in _encoded(predictor, batches):
            said = objective.predict(predictor.model, encoded, batch)
            target = batch.targets[name]
            kept = said["present"].bool() & _known(target)
            outputs.append(said["logits" if "logits" in said else "value"][kept])
            wanted.append(target[kept])
        if not sum(map(len, outputs)):
            return {}
        return _KINDS[predictor.targets[name]["kind"]](joined(outputs), joined(wanted))

    def _objective(self, predictor: Predictor, manifest: Manifest) -> tuple[Objective, str]:
        held = {name: getattr(objective, "target", None) for name, objective in predictor.objectives.items()}
        columns = {"label"} if manifest.label else set()
        columns |= set(manifest.table.columns) - {"label"}
        for name, target in held.items():
            if target in columns & predictor.targets.keys() and self.target in (None, target):
                return predictor.objectives[name], str(target)
        wanted = ", ".join(str(target) for target in held.values() if target) or "nothing with a target"
        raise ManifestError(f"{manifest.path}: this model was trained for {wanted}, and no such column is there")


@dataclass(frozen=True)
class Retrieval:
    """From each modality to each other one, by the heads of their names.

    Rows that share a picture (or what else a pair has fewer of) belong together: a picture is found by any of its
    captions, as on COCO and Flickr, and is asked for once.
    """

    cuts: tuple[int, ...] = RECALL_AT
    headline: str = "mean_recall"
    by_subset: bool = False

    def targets(self, predictor: Predictor, manifest: Manifest) -> dict[str, Target]:
        """None are needed."""
        return {}

    def judge(self, predictor: Predictor, manifest: Manifest, batches: Iterable[Batch]) -> dict[str, Measure]:
        """Of the samples that have both modalities of a direction."""
        found = self._vectors(predictor, batches)
        rows = {manifest.id(i): i for i in range(len(manifest))}
        letter = letters(list(found))
        ranks: dict[str, np.ndarray] = {}
        for one, other in permutations(letter, 2):
            ids = [id for id in found[one] if id in found[other]]
            if not ids:
                continue
            places = np.array([rows[id] for id in ids])
            codes = {name: manifest.inputs[name].codes[places] for name in (one, other)}
            group = min(codes.values(), key=lambda c: len(np.unique(c)))
            first = {m: np.unique(np.stack([codes[m], group]), axis=1, return_index=True)[1] for m in codes}
            vectors = {m: torch.stack([found[m][ids[i]] for i in first[m]]) for m in codes}
            groups = torch.from_numpy(group[first[one]]), torch.from_numpy(group[first[other]])
            column = np.full(len(manifest), np.nan)
            column[places[first[one]]] = judge_vectors(first_ranks, vectors[one], vectors[other], groups)
            ranks[f"{letter[one]}2{letter[other]}"] = column
        return self._measures(ranks) if ranks else {}

    def _vectors(self, predictor: Predictor, batches: Iterable[Batch]) -> dict[str, dict[str, Tensor]]:
        """The vector of each sample by its id, by modality."""
        names = [name for name in predictor.model.encoders if name in predictor.model.heads]
        if len(names) < 2:
            have = ", ".join(predictor.model.heads) or "none"
            raise ValueError(f"retrieval needs heads of two modalities, this model has heads for {have}")
        found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for encoded, batch in _encoded(predictor, batches):
            for name in filter(encoded.__contains__, names):
                vectors, present = predictor.model.output(encoded, name, source=name)
                held = zip(batch.ids, vectors.float().cpu(), present.tolist(), strict=True)
                found[name] |= {id: vector for id, vector, there in held if there}
        return {name: vectors for name, vectors in found.items() if vectors}

    def _measures(self, ranks: Mapping[str, np.ndarray]) -> dict[str, Measure]:
        """Of ranks by direction, a row of the manifest each; NaN in rows that did not ask."""
        every = np.stack(list(ranks.values()), axis=1)
        every = every[~np.isnan(every).all(1)]  # directions are drawn together, as their samples are the same
        out = {"mean_recall": Measure(rows=every, statistic=partial(_recall, cuts=self.cuts))}
        out |= {f"r@{cut}": Measure(rows=every, statistic=partial(_recall, cuts=(cut,))) for cut in self.cuts}
        for direction, column in ranks.items():
            asked = column[~np.isnan(column)]
            out |= {f"{direction}_r@{cut}": Measure(rows=asked <= cut) for cut in self.cuts}
            out[f"{direction}_mrr"] = Measure(rows=1 / asked)
            out[f"{direction}_median_rank"] = Measure(rows=asked, statistic=_median)
        return out


@dataclass(frozen=True)
class ZeroShot:
    """Classes by their names: a sample is of the class whose name, in a sentence, lies nearest to it.

    `source` is the modality that is judged, the first besides the text where None.
    """

    target: str = "label"
    templates: Sequence[str] = ("{}",)
    source: str | None = None
    headline: str = "acc"
    by_subset: bool = False

    def targets(self, predictor: Predictor, manifest: Manifest) -> dict[str, Target]:
        """The column with the names of the classes."""
        return {"zero shot": self._classes(manifest)}

    def judge(self, predictor: Predictor, manifest: Manifest, batches: Iterable[Batch]) -> dict[str, Measure]:
        """Of the samples that have a class and the modality."""
        heads, encoders = predictor.model.heads, predictor.model.encoders
        sources = [name for name in encoders if name in heads and name != "text" and self.source in (None, name)]
        if "text" not in heads or not sources:
            raise ValueError(f"zero-shot classes need heads for text and for {self.source or 'another modality'}, "
                             f"this model has {', '.join(heads) or 'none'}")  # fmt: skip
        names = self._classes(manifest).names

        def embed(texts: list[str]) -> Tensor:
            return predictor.embed([{"text": text} for text in texts], "text")

        classes = class_vectors(embed, names, self.templates)
        ranks = []
        for encoded, batch in _encoded(predictor, batches):
            if sources[0] in encoded:
                vectors, present = predictor.model.output(encoded, sources[0], source=sources[0])
                target = batch.targets["zero shot"]
                kept = present.bool() & (target >= 0)
                ranks.append(class_ranks(vectors[kept].cpu(), classes, target[kept].cpu()))
        if not sum(map(len, ranks)):
            return {}
        found = joined(ranks).numpy()
        return {"acc": Measure(rows=found <= 1)} | ({"top5": Measure(rows=found <= 5)} if len(names) > 5 else {})

    def _classes(self, manifest: Manifest) -> Target:
        found = manifest.label if self.target == "label" else manifest.read_target(self.target, "Classes")
        if found is None or found.kind != "Classes":
            raise ManifestError(
                f"{manifest.path}: zero-shot needs a column of classes (--target): {self.target} is none"
            )
        return found


def _encoded(predictor: Predictor, batches: Iterable[Batch]) -> Iterator[tuple[Any, Batch]]:
    for batch in batches:
        batch = batch.to(predictor.device)
        with torch.inference_mode():
            yield predictor.model.encode(batch), batch


def _known(target: Tensor) -> Tensor:
    """Which samples have a target."""
    if not target.is_floating_point():
        return target >= 0
    return ~target.isnan() if target.ndim == 1 else ~target.isnan().all(1)


def _classes(logits: Tensor, target: Tensor) -> dict[str, Measure]:
    shares = logits.softmax(-1)
    confidence, said = shares.max(-1)
    right = said == target
    both = torch.stack([confidence, right.float()], 1).numpy()
    return {
        "acc": Measure(rows=right.numpy()),
        "nll": Measure(rows=negative_log_likelihoods(shares.double(), target).numpy()),
        "ece": Measure(rows=both, statistic=_calibration),
    }


def _tags(logits: Tensor, target: Tensor) -> dict[str, Measure]:
    return {"map": Measure(rows=torch.stack([logits, target], 1).numpy(), statistic=_precision)}


def _numbers(value: Tensor, target: Tensor) -> dict[str, Measure]:
    error = (value.double() - target.double()).numpy()
    return {"mae": Measure(rows=np.abs(error)), "rmse": Measure(rows=error**2, statistic=_root)}


_KINDS: dict[str, Callable[[Tensor, Tensor], dict[str, Measure]]] = {
    "Classes": _classes,
    "Labels": _tags,
    "Number": _numbers,
}


def _calibration(rows: np.ndarray) -> float:
    found = torch.from_numpy(rows)
    return expected_calibration_error(reliability(found[:, 0], found[:, 1] > 0.5))


def _precision(rows: np.ndarray) -> float:
    found = torch.from_numpy(rows)
    return mean_average_precision(found[:, 0], found[:, 1])


def _recall(rows: np.ndarray, cuts: Sequence[int]) -> float:
    """The mean over cuts and directions of the share of queries that are answered among the first."""
    asked = np.maximum((~np.isnan(rows)).sum(0), 1)
    return float(np.mean([(rows <= cut).sum(0) / asked for cut in cuts]))


def _root(rows: np.ndarray) -> float:
    return float(np.sqrt(rows.mean()))


def _median(rows: np.ndarray) -> float:
    return float(np.median(rows))
