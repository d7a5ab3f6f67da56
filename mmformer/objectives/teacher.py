"""Trained models as teachers of the objectives behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmformer.batch import Batch
from mmformer.model import Encoded, Model
from mmformer.objectives.answers import Cache
from mmformer.objectives.momentum import Taught
from mmformer.objectives.objective import Objective
from mmformer.tokens import Tokens

Open = Callable[[str], tuple[Model, str]]
"""Opens a trained run: its model, and a mark that changes with its weights."""


class Lesson:
    """What one teacher says of a batch when it is asked: computed once, or read from disk; nothing has a gradient.

    `weight` is how much the teacher counts, between 0 and 1.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        weight: Float[Tensor, ""],
        *,
        encoded: Encoded | None = None,
        keep: Callable[[str, Callable[[], Tensor]], Tensor] | None = None,
    ):
        self.model, self.batch, self.weight = model, batch, weight
        self._encoded, self._keep = encoded, keep
        self._said: dict[tuple[str, str | None], tuple[Tensor, Tensor]] = {}

    @property
    def encoded(self) -> Encoded:
        """The batch as the teacher reads it: all modalities that both have."""
        if self._encoded is None:
            self.reread()
        assert self._encoded is not None
        return self._encoded

    @torch.no_grad()
    def reread(self) -> None:
        """Encode the batch again, for those who have put something inside the model since."""
        self._encoded = self.model.encode(self.batch)

    @torch.no_grad()
    def output(self, head: str, source: str | None) -> tuple[Float[Tensor, "B O"], Bool[Tensor, " B"]]:
        """What a head of the teacher says of each sample, and for which it had something to read."""
        if (head, source) not in self._said:
            self._said[head, source] = self._output(head, source)
        return self._said[head, source]

    def _output(self, head: str, source: str | None) -> tuple[Tensor, Tensor]:
        if self._keep is None:
            return self.model.output(self.encoded, head, source)
        rows = self._keep(f"{head} of {source}", lambda: _with_nan(*self.model.output(self.encoded, head, source)))
        present = ~rows.isnan().any(1)
        return torch.where(present[:, None], rows, 0), present

    @torch.no_grad()
    def fused(self) -> Tokens:
        """The teacher's fused sequence."""
        return self.model.fuse(self.encoded)


class Lessons(tuple[Lesson, ...]):
    """What all teachers say of a batch, in `encoded.shared[Lessons]`."""


def lessons(encoded: Encoded, batch: Batch) -> Lessons:
    """What the teachers in front of an objective say of a batch: trained runs, or a slow copy of the model.

    Raises:
        ValueError: there is no teacher.
    """
    if Lessons in encoded.shared:
        return encoded.shared[Lessons]
    if Taught in encoded.shared:
        taught = Taught.of(encoded)
        return Lessons([Lesson(taught.model, batch, taught.weight, encoded=taught.encoded)])
    raise ValueError("no teacher: put the objective `teacher` or `momentum` in front of those that listen to it")


@dataclass(frozen=True)
class _Opened:
    """Models with their marks; shared by copies of the objective, as nothing changes them."""

    models: tuple[tuple[Model, str], ...] = field(repr=False)

    def __deepcopy__(self, memo: dict) -> _Opened:
        return self


class Teacher(Objective):
    """Trained runs as teachers of the objectives behind it (arXiv 1503.02531); it has no loss of its own.

    `runs` are folders that `open` is told to open. Each teacher reads all of a batch that it knows, whatever the
    student is shown, so it may have more modalities; where listeners ask for one thing, the mean over the teachers of
    the loss counts. They are frozen, in evaluation mode, and no part of a checkpoint. `weight` is how much they count
    for those that mix them with other targets. `cache` keeps their answers on disk. `allow` names packages of one's own
    that the runs use. One teacher without a cache also serves as `Taught`.

    Raises:
        ValueError: no runs.
    """

    by_subset = False

    def __init__(
        self, runs: Sequence[str], cache: Cache | None = None, *, weight: float = 1.0, allow: Sequence[str] = ()
    ):
        super().__init__()
        if not runs:
            raise ValueError("a teacher of no runs: name one, as in module.objectives.teacher.runs=[runs/digits/..]")
        self.runs, self.cache, self.weight, self.allow = list(runs), cache, weight, list(allow)
        self._opened: _Opened | None = None

    def open(self, open_run: Open) -> None:
        """Load the runs, each by the function that is given: objectives know nothing of files."""
        found = [open_run(run) for run in self.runs]
        for model, _ in found:
            model.requires_grad_(False).eval()
        self._opened = _Opened(tuple(found))

    @property
    def models(self) -> tuple[Model, ...]:
        """The teachers, in the order of `runs`.

        Raises:
            ValueError: they were not opened.
        """
        return tuple(model for model, _ in self._pairs())

    def prepare(self, model: Model) -> None:
        self._pairs()

    @torch.no_grad()
    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Leaves `Lessons` with what is encoded, behind those of other teachers."""
        place = next(model.parameters()).device
        weight = torch.tensor(self.weight, device=place)
        found = []
        for teacher, mark in self._pairs():
            if next(teacher.parameters()).device != place:
                teacher.to(place)
            found.append(Lesson(teacher, batch, weight, keep=self._keeper(mark, batch)))
        encoded.shared[Lessons] = Lessons([*encoded.shared.get(Lessons, ()), *found])
        if len(found) == 1 and self.cache is None:
            encoded.shared[Taught] = Taught(model=found[0].model, encoded=found[0].encoded, weight=weight)
        return {}

    def _pairs(self) -> tuple[tuple[Model, str], ...]:
        if self._opened is None:
            raise ValueError(
                f"the teachers {', '.join(self.runs)} were not opened: train.py does so, elsewhere call "
                "mmformer.run.teachers.open_teachers"
            )
        return self._opened.models

    def _keeper(self, mark: str, batch: Batch) -> Callable[[str, Callable[[], Tensor]], Tensor] | None:
        cache = self.cache
        if cache is None:
            return None
        return lambda question, say: cache.rows(f"{mark} {question}", batch, self.training, say)


def _with_nan(values: Float[Tensor, "B O"], present: Bool[Tensor, " B"]) -> Float[Tensor, "B O"]:
    return torch.where(present[:, None], values.float(), torch.nan)
