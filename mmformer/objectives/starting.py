"""Texts that begin with another token for another task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mmformer.batch import Batch, Ragged
from mmformer.model import Encoded, Model
from mmformer.objectives.objective import Meter, Objective


class StartingWith(Objective):
    """An objective for which each text begins with the id `first` and not with its own: BLIP's [ENC] and [DEC].

    Texts are encoded again for it, so their feature must put a token in front (`begin: true`), or it is a word that is
    overwritten. `modality` is that of the texts.
    """

    def __init__(self, objective: Objective, first: int, modality: str = "text"):
        super().__init__()
        self.objective, self.first, self.modality = objective, first, modality

    def prepare(self, model: Model) -> None:
        self.objective.prepare(model)

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        return self.objective(model, *self.reread(model, encoded, batch))

    def advance(self, model: Model) -> None:
        self.objective.advance(model)

    def exported(self) -> StartingWith:
        return StartingWith(self.objective.exported(), self.first, self.modality)

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """What the objective predicts."""
        return self.objective.predict(model, *self.reread(model, encoded, batch))

    def meter(self) -> Meter | None:
        return self.objective.meter()

    def reread(self, model: Model, encoded: Encoded, batch: Batch) -> tuple[Encoded, Batch]:
        """What is encoded and the batch, with the texts as the objective is to see them."""
        if self.modality not in encoded:
            return encoded, batch
        items = starting_with(batch.inputs[self.modality], self.first)
        changed: Mapping[str, Ragged] = batch.inputs | {self.modality: items}
        again = Encoded(encoded | {self.modality: model.encoders[self.modality](items, len(batch))}, len(batch))
        again.shared = encoded.shared
        return again, replace(batch, inputs=dict(changed))


def starting_with(items: Ragged, first: int) -> Ragged:
    """The same texts with another id in the place of the first of each."""
    lengths = np.array([shape[0] for shape in items.shapes], dtype=np.int64)
    places = torch.from_numpy((np.cumsum(lengths) - lengths)[lengths > 0])
    return replace(items, values=items.values.index_fill(0, places.to(items.values.device, non_blocking=True), first))
