"""The space that modalities share, as one objective leaves it for those behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmformer.batch import Batch
from mmformer.model import Encoded, Model
from mmformer.objectives import ranks


@dataclass(frozen=True, kw_only=True)
class Space:
    """Unit vectors of a batch by modality, a row a sample; put into `encoded.shared[Space]` by a contrastive objective.

    `rows` ask and `keys` are what they are compared with: the same vectors, or a teacher's. `scale` multiplies their
    similarity. Nothing of it has a gradient.
    """

    rows: Mapping[str, Float[Tensor, "B D"]]
    keys: Mapping[str, Float[Tensor, "B D"]]
    scale: Float[Tensor, ""]

    @staticmethod
    def of(rows: Mapping[str, Tensor], keys: Mapping[str, Tensor], scale: Tensor) -> Space:
        """The space of these vectors, without their gradients."""
        without = ({name: vectors.detach() for name, vectors in found.items()} for found in (rows, keys))
        return Space(rows=next(without), keys=next(without), scale=scale.detach())


def embed(
    model: Model, encoded: Encoded, modalities: Sequence[str], absent: float = 0.0
) -> dict[str, Float[Tensor, "B D"]]:
    """What the heads of the modalities say of each sample, `absent` where it lacks one; no modality that all lack."""
    out = {}
    for name in modalities:
        if name in encoded:
            vector, present = model.output(encoded, name, source=name)
            out[name] = torch.where(present[:, None], vector, absent)
    return out


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The samples that have two modalities: n of this process and N of all, in the order of the processes.

    `own` are their rows in the batch, `place` where they stand among those of all. `ids` say what each of the N shows:
    a number of at least 0 that samples share which show the same, -100 for one that is only like itself.
    """

    own: Int[Tensor, " n"]
    place: Int[Tensor, " n"]
    ids: Int[Tensor, " N"]

    @staticmethod
    def of(batch: Batch, modalities: Sequence[str], target: str | None) -> Pairs:
        """Those of a batch; `target` names the integer target that says what a sample shows.

        Raises:
            KeyError: the data have no such target.
        """
        have = [set(batch.inputs[name].rows) if name in batch.inputs else set() for name in modalities]
        device = next((items.values.device for items in batch.inputs.values()), None)
        own = torch.tensor(sorted(set.intersection(*have)), dtype=torch.long, device=device)
        place = ranks.start(len(own)) + torch.arange(len(own), device=device)
        return Pairs(own=own, place=place, ids=ranks.gather_ids(shown(batch, target)[own]))

    def same(self, more: Int[Tensor, " Q"] | None = None) -> Bool[Tensor, "n M"]:
        """Which of the N, and of `more` ids behind them, show what each of the n shows; itself among them."""
        mine = self.ids[self.place]
        keys = self.ids if more is None else torch.cat([self.ids, more])
        same = (mine[:, None] == keys) & (mine >= 0)[:, None]
        return same.scatter(1, self.place[:, None], True)


def shown(batch: Batch, target: str | None) -> Int[Tensor, " B"]:
    """What each sample shows, by an integer target; -100 where that is not known, or no target is named.

    Raises:
        KeyError: the data have no such target.
    """
    if target is None:
        device = next((items.values.device for items in batch.inputs.values()), None)
        return torch.full((len(batch),), -100, device=device)
    if target not in batch.targets:
        raise KeyError(f"the data have no target {target!r} that says what a sample shows, but {sorted(batch.targets)}")
    return batch.targets[target].long()
