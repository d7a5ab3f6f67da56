"""Objectives that arrange samples as a teacher does: by distances and angles, or in the space modalities share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.losses.distill import affinity, angles, distances
from mmformer.losses.matching import similarity
from mmformer.model import Encoded, Model
from mmformer.objectives import ranks
from mmformer.objectives.objective import Objective, without
from mmformer.objectives.space import Pairs, embed
from mmformer.objectives.teacher import Lesson, lessons


class TaughtRelations(Objective):
    """The samples of a batch as far from one another, and at such angles, as a teacher's (RKD, arXiv 1904.05068).

    Of the vectors that a head gives, which may have another width than the teacher's; `source` as in `Classes`. The
    losses `distance` and `angle`, of all processes' samples together, of the latter the first `triples`, as its work
    grows with their cube. The paper weighs them 25 and 50.
    """

    by_subset = False

    def __init__(self, head: str, distance: float, angle: float, source: str | None = None, *, triples: int = 64):
        super().__init__()
        self.head, self.source, self.distance, self.angle, self.triples = head, source, distance, angle, triples

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        found = [self._against(lesson, model, encoded) for lesson in lessons(encoded, batch)]
        return {name: torch.stack([part[name] for part in found]).mean() for name in found[0]}

    def _against(self, lesson: Lesson, model: Model, encoded: Encoded) -> dict[str, Tensor]:
        said, present = model.output(encoded, self.head, self.source)
        taught, known = lesson.output(self.head, self.source)
        chosen = (present.bool() & known.bool()).nonzero()[:, 0]
        rows = ranks.gather_rows(said[chosen])
        wanted = ranks.gather_rows(taught[chosen]).detach()
        if len(rows) < 3:
            return dict.fromkeys(("distance", "angle"), rows.sum() * 0)
        few = slice(self.triples)
        return {
            "distance": lesson.weight * self.distance * distances(rows, wanted),
            "angle": lesson.weight * self.angle * angles(rows[few], wanted[few]),
        }


class TaughtContrastive(Objective):
    """Embeddings of modalities like a teacher's, over every pair of `modalities` (CLIP-KD, arXiv 2307.12732).

    Three losses, each times its weight: `feature`, the squared error to the teacher's embedding (FD); `affinity`, the
    KL divergence from how the teacher's similarities share a sample out among its partners (CRD, and the affinity
    mimicking of TinyCLIP, arXiv 2309.12314); `interactive`, the contrastive loss of the student's embeddings against
    the teacher's (ICL). The heads named like the modalities give unit vectors of `dim` channels, the teacher's of
    `taught_dim`; where these differ, a linear map that only training needs brings the student's there. Similarities
    are multiplied by `scale`, and the keys are those of all processes.

    Raises:
        ValueError: fewer than two modalities.
    """

    by_subset = False

    def __init__(
        self,
        modalities: Sequence[str],
        dim: int,
        taught_dim: int,
        scale: float,
        *,
        feature: float,
        affinity: float,
        interactive: float,
    ):
        super().__init__()
        if len(modalities) < 2:
            raise ValueError(f"contrastive over {list(modalities)}: name at least two modalities")
        self.modalities, self.dims, self.scale = list(modalities), (dim, taught_dim), scale
        self.weights = {"feature": feature, "affinity": affinity, "interactive": interactive}
        self.maps: nn.ModuleDict | None = None

    def prepare(self, model: Model) -> None:
        differ = self.dims[0] != self.dims[1]
        self.maps = nn.ModuleDict(
            {name: nn.Linear(*self.dims) if differ else nn.Identity() for name in self.modalities}
        )

    def exported(self) -> TaughtContrastive:
        return without(self, "maps")

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        if self.maps is None:
            raise ValueError("the maps were not made: call prepare(model) once the model has its weights")
        none = next(model.parameters()).new_zeros
        rows = dict.fromkeys(self.modalities, none(len(batch), self.dims[0])) | embed(model, encoded, self.modalities)
        found = []
        for lesson in lessons(encoded, batch):
            taught = {name: self._taught(lesson, name) for name in self.modalities}
            pairs = [self._pair(rows, taught, pair, encoded, batch) for pair in combinations(self.modalities, 2)]
            found += [{name: lesson.weight * loss for name, loss in losses.items()} for losses in pairs]
        return {name: torch.stack([losses[name] for losses in found]).mean() for name in self.weights}

    def _taught(self, lesson: Lesson, name: str) -> Float[Tensor, "B E"]:
        if name not in lesson.batch.inputs:
            return next(lesson.model.parameters()).new_zeros(len(lesson.batch), self.dims[1])
        taught, present = lesson.output(name, name)
        return torch.where(present[:, None].bool(), taught, 0)

    def _pair(
        self, rows: dict, taught: dict, names: tuple[str, str], encoded: Encoded, batch: Batch
    ) -> dict[str, Float[Tensor, ""]]:
        """The losses of one pair of modalities, over the samples that have both, each both ways."""
        assert self.maps is not None
        pairs = Pairs.of(batch.only(list(encoded)), names, None)
        own = pairs.own
        said = [rows[name][own] for name in names]
        told = [taught[name][own].detach() for name in names]
        mapped = [F.normalize(self.maps[name](x), dim=-1) for name, x in zip(names, said, strict=True)]
        keys = [ranks.gather_rows(x) for x in said]
        wanted = [ranks.gather_rows(x).detach() for x in told]
        total = {name: said[0].float().sum() * 0 for name in self.weights}
        for one, other in ((0, 1), (1, 0)):
            far = (mapped[one].float() - told[one].float()).square().mean(1).sum()
            mine = self.scale * similarity(said[one], keys[other])
            theirs = self.scale * similarity(told[one], wanted[other])
            total["feature"] += far / 2
            total["affinity"] += affinity(mine, theirs) / 2
            crossed = F.cross_entropy(self.scale * similarity(mapped[one], wanted[other]), pairs.place, reduction="sum")
            total["interactive"] += crossed / 2
        return {name: self.weights[name] * ranks.shared_mean(loss, len(own)) for name, loss in total.items()}
