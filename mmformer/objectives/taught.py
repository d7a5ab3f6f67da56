"""Objectives that say what a teacher says: classes, labels, numbers, tokens, also of less than the teacher sees."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmformer.batch import Batch
from mmformer.losses.distill import softened, softened_labels
from mmformer.model import Encoded, Model
from mmformer.objectives import ranks
from mmformer.objectives.language import NextToken, untouched
from mmformer.objectives.objective import Meter, Objective
from mmformer.objectives.teacher import Lesson, lessons


@runtime_checkable
class Comparison(Protocol):
    """A loss of what is said of n samples against what a teacher says of them, summed; `unit` is the head's."""

    def __call__(self, said: Float[Tensor, "n O"], taught: Float[Tensor, "n O"], unit: float) -> Float[Tensor, ""]: ...


@dataclass(frozen=True)
class SoftClasses:
    """One of several classes: KL divergence of softened distributions (arXiv 1503.02531)."""

    temperature: float

    def __call__(self, said: Tensor, taught: Tensor, unit: float) -> Float[Tensor, ""]:
        return softened(said, taught, self.temperature)


@dataclass(frozen=True)
class SoftLabels:
    """Any number of classes at once: KL divergence of softened decisions, the mean over classes."""

    temperature: float

    def __call__(self, said: Tensor, taught: Tensor, unit: float) -> Float[Tensor, ""]:
        return softened_labels(said, taught, self.temperature) / said.shape[1]


@dataclass(frozen=True)
class SoftNumber:
    """A number: the squared error in units of the head's standard deviation, which no temperature changes."""

    temperature: float = 1.0

    def __call__(self, said: Tensor, taught: Tensor, unit: float) -> Float[Tensor, ""]:
        return ((said.float() - taught.float()) / unit).square().sum()


class TaughtOutput(Objective):
    """What a head says of each sample, against what the teachers' head says: the mean over teachers.

    `head` and `source` as in `Classes`; `taught_head` is the teachers' head where that is called otherwise. Only
    samples count of which both had something to read; targets are not needed.
    """

    by_subset = False

    def __init__(self, head: str, compare: Comparison, source: str | None = None, taught_head: str | None = None):
        super().__init__()
        self.head, self.compare, self.source, self.taught_head = head, compare, source, taught_head or head

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        found = lessons(encoded, batch)
        if not encoded.num_samples or (self.source and self.source not in {*encoded, *model.views}):
            losses = [ranks.shared_mean(ranks.nothing(model), 0) for _ in found]
        else:
            said, present = model.output(encoded, self.head, self.source)
            unit = getattr(model.heads[self.head], "std", 1.0)
            losses = [self._against(lesson, said, present, unit) for lesson in found]
        return {"loss": torch.stack(losses).mean()}

    def _against(self, lesson: Lesson, said: Tensor, present: Tensor, unit: float) -> Float[Tensor, ""]:
        taught, known = lesson.output(self.taught_head, self.source)
        if taught.shape != said.shape:
            raise ValueError(
                f"head {self.head!r} says {said.shape[1]} numbers of a sample, the teacher's {self.taught_head!r} "
                f"{taught.shape[1]}: both must have been made for the same classes"
            )
        chosen = (present & known).nonzero()[:, 0]
        return lesson.weight * ranks.shared_mean(self.compare(said[chosen], taught[chosen], unit), len(chosen))


class TaughtTokens(Objective):
    """Each token of a text as a teacher would go on, by the softened distribution over the vocabulary.

    `language` says which tokens train, from which sequence and by which head: word-level distillation of sequence
    models (arXiv 1606.07947, section 3.1). Its own loss is not counted. The vocabularies must be the same.
    """

    by_subset = False

    def __init__(self, language: NextToken, temperature: float):
        super().__init__()
        self.language, self.temperature = language, temperature

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        found = lessons(encoded, batch)
        if self.language.modality not in encoded:
            head = model.heads[self.language.head]
            return {"loss": torch.stack([ranks.shared_mean(untouched(head), 0) for _ in found]).mean()}
        said, ids, _ = self.language.scores(model, encoded, batch)
        losses = []
        for lesson in found:
            with torch.no_grad():
                taught, _, _ = self.language.scores(lesson.model, lesson.encoded, lesson.batch)
            if taught.shape != said.shape:
                raise ValueError(
                    f"{len(said)} tokens of {said.shape[1]} words, the teacher has {len(taught)} of "
                    f"{taught.shape[1]}: it must read the same texts with the same vocabulary"
                )
            losses.append(lesson.weight * ranks.shared_mean(softened(said, taught, self.temperature), len(ids)))
        return {"loss": torch.stack(losses).mean()}


class WithoutSome(Objective):
    """An objective that sees each batch without some of its modalities, another choice each time.

    What a teacher says of all of them a student so learns to say of less.
    Every non-empty subset is equally likely; in evaluation nothing is left out.
    """

    by_subset = False

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective

    def prepare(self, model: Model) -> None:
        self.objective.prepare(model)

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        if not self.training:
            return self.objective(model, encoded, batch)
        names = sorted(model.encoders)
        choices = [chosen for size in range(1, len(names) + 1) for chosen in combinations(names, size)]
        chosen = choices[int(torch.randint(len(choices), ()))]
        part = encoded.only(chosen)
        part.shared = encoded.shared
        return self.objective(model, part, batch.only(chosen))

    def advance(self, model: Model) -> None:
        self.objective.advance(model)

    def exported(self) -> WithoutSome:
        return WithoutSome(self.objective.exported())

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """What the objective predicts."""
        return self.objective.predict(model, encoded, batch)

    def meter(self) -> Meter | None:
        return self.objective.meter()
