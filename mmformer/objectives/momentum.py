"""A slow copy of the model as a teacher, and contrastive learning that listens to it (ALBEF, BLIP)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.losses.distill import distilled_contrastive
from mmformer.losses.matching import similarity
from mmformer.model import Encoded, Model
from mmformer.objectives import ranks
from mmformer.objectives.contrastive import RetrievalMeter
from mmformer.objectives.objective import Objective, without
from mmformer.objectives.queue import Queue
from mmformer.objectives.space import Pairs, Space, embed, shown

COLDEST, WARMEST = 0.001, 0.5
"""Between which the temperature is learned, as in ALBEF's code."""


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What a teacher makes of a batch, in `encoded.shared[Taught]`: its model, what that encoded, how much it counts.

    Nothing of it has a gradient. `weight` lies between 0 and 1.
    """

    model: Model
    encoded: Encoded
    weight: Float[Tensor, ""]

    @staticmethod
    def of(encoded: Encoded) -> Taught:
        """What the teacher made of a batch.

        Raises:
            ValueError: no objective in front of this one has a teacher.
        """
        if Taught not in encoded.shared:
            raise ValueError("no teacher: put the objective `momentum` in front of those that listen to it")
        return encoded.shared[Taught]


class Momentum(Objective):
    """A teacher for the objectives behind it: an average of the model's weights over steps (ALBEF, section 3.4).

    After each step of the optimizer the copy keeps `decay` of itself; before the first it is the model. It has no loss
    of its own. What it says counts `weight` in the targets of others, growing to that over the first `ramp` steps. It
    stays in evaluation mode, so that it has no dropout, and weights that are frozen for good are shared, not copied.
    """

    step: Int[Tensor, ""]

    def __init__(self, decay: float, weight: float, ramp: int):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: it must lie between 0 and 1, such as 0.995")
        self.decay, self.weight, self.ramp = decay, weight, ramp
        self.model: Model | None = None
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def prepare(self, model: Model) -> None:
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model = deepcopy(model, frozen).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Momentum:
        super().train(mode)
        if self.model is not None:
            self.model.eval()
        return self

    @torch.no_grad()
    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Leaves `Taught` with what is encoded."""
        if self.model is None:
            raise ValueError("the teacher was not made: call prepare(model) once the model has its weights")
        weight = (
            self.weight * (self.step / self.ramp).clamp(max=1)
            if self.ramp
            else torch.full_like(self.step, self.weight, dtype=torch.float32)
        )
        encoded.shared[Taught] = Taught(model=self.model, encoded=self.model.encode(batch), weight=weight)
        return {}

    @torch.no_grad()
    def advance(self, model: Model) -> None:
        assert self.model is not None
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        moving = [(ours.detach(), new.detach()) for ours, new in pairs if ours is not new]
        if moving:
            mine, theirs = zip(*moving, strict=True)
            torch._foreach_lerp_(mine, theirs, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
        for ours, new in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(new)
        self.step += 1

    def exported(self) -> Momentum:
        return without(self, "model")


class MomentumContrastive(Objective):
    """Contrastive learning against a teacher's embeddings of the batch and of a queue (ALBEF, arXiv 2107.07651, eq. 6).

    Over every pair of `modalities`, on the samples that have both, the mean over pairs; both directions of a pair. The
    model's head of a modality's name embeds it in `dim` channels and must give unit vectors. The keys are the
    teacher's, of all processes, then the last `queue` of each modality; the target mixes the true pair with what the
    teacher itself finds similar. `temperature` divides similarities; it is learned, between 0.001 and 0.5. `same`
    names an integer target of what a sample shows: those of one number are then positives of each other.

    Leaves the `Space` for objectives behind it, such as `Matching`.

    Raises:
        ValueError: fewer than two modalities.
    """

    headline = ("mean_recall", "max")
    by_subset = False

    def __init__(self, modalities: Sequence[str], dim: int, queue: int, temperature: float, same: str | None = None):
        super().__init__()
        if len(modalities) < 2:
            raise ValueError(f"contrastive over {list(modalities)}: name at least two modalities")
        self.modalities, self.dim, self.size, self.same = list(modalities), dim, queue, same
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.queues: nn.ModuleDict | None = None
        self._made: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.modalities}

    def prepare(self, model: Model) -> None:
        names = self.modalities if self.size else ()
        self.queues = nn.ModuleDict({name: Queue(self.dim, self.size, zlib.crc32(name.encode())) for name in names})

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        taught, nothing = Taught.of(encoded), self.log_scale.new_zeros(len(batch), self.dim)
        rows = dict.fromkeys(self.modalities, nothing) | embed(model, encoded, self.modalities)
        with torch.no_grad():
            keys = dict.fromkeys(self.modalities, nothing) | embed(taught.model, taught.encoded, self.modalities)
        scale = self.log_scale.exp()
        encoded.shared[Space] = Space.of(rows, keys, scale)
        if self.training and torch.is_grad_enabled():
            self._keep(keys, batch)
        losses = {}
        for one, other in combinations(self.modalities, 2):
            pairs = Pairs.of(batch, (one, other), self.same)
            forth = self._direction(rows[one], keys[one], keys[other], other, pairs, taught.weight)
            back = self._direction(rows[other], keys[other], keys[one], one, pairs, taught.weight)
            if len(pairs.ids):
                losses[f"{one}_{other}"] = ranks.shared_mean((forth + back) / 2, len(pairs.own))
        return {name: loss / len(losses) for name, loss in losses.items()}

    def _direction(
        self,
        rows: Float[Tensor, "B D"],
        taught: Float[Tensor, "B D"],
        keys: Float[Tensor, "B D"],
        asked: str,
        pairs: Pairs,
        weight: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """The loss of finding the keys of the modality that is asked for, summed over this process's pairs."""
        queue = self._queue(asked)
        everyone = ranks.gather_rows(keys[pairs.own]).detach()
        everyone = everyone if queue is None else torch.cat([everyone, queue.rows])
        scale = self.log_scale.exp()
        said = scale * similarity(rows[pairs.own], everyone)
        told = scale.detach() * similarity(taught[pairs.own], everyone)
        return distilled_contrastive(said, told, pairs.same(None if queue is None else queue.ids), weight)

    def _queue(self, name: str) -> Queue | None:
        if self.queues is None:
            raise ValueError("the queues were not made: call prepare(model) once the model has its weights")
        queue = self.queues[name] if self.size else None
        assert queue is None or isinstance(queue, Queue)
        return queue

    def _keep(self, keys: Mapping[str, Float[Tensor, "B D"]], batch: Batch) -> None:
        """Put the teacher's embeddings aside until the step is made."""
        ids = shown(batch, self.same)
        for name in self.modalities if self.size else ():
            has = torch.tensor(sorted(set(batch.inputs[name].rows)) if name in batch.inputs else [], dtype=torch.long)
            has = has.to(ids.device)
            self._made[name].append((keys[name][has], ids[has]))

    @torch.no_grad()
    def advance(self, model: Model) -> None:
        for name, made in self._made.items():
            queue = self._queue(name)
            if queue is not None:
                rows = torch.cat([queue.rows[:0], *(rows for rows, _ in made)])
                ids = torch.cat([queue.ids[:0], *(ids for _, ids in made)])
                with torch.enable_grad():  # as in a step of training, in which processes ask each other
                    rows, ids = ranks.gather_rows(rows).detach(), ranks.gather_ids(ids)
                queue.add(rows, ids)
            made.clear()
        self.log_scale.clamp_(-math.log(WARMEST), -math.log(COLDEST))

    def exported(self) -> MomentumContrastive:
        return without(self, "queues")

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Unit vectors `<modality>`, NaN where a sample lacks it."""
        return embed(model, encoded, self.modalities, absent=torch.nan)

    def meter(self) -> RetrievalMeter:
        return RetrievalMeter(self.modalities)
