"""Masked words, some of whose targets a teacher gives (ALBEF)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from mmformer.batch import Batch
from mmformer.losses.distill import distilled_tokens
from mmformer.model import Encoded, Model
from mmformer.objectives import ranks
from mmformer.objectives.language import untouched
from mmformer.objectives.masked import Riddle, Words
from mmformer.objectives.momentum import Taught
from mmformer.objectives.objective import Objective
from mmformer.tokens import find, take


class DistilledWords(Objective):
    """Guess masked words of a text by the fusion, as the text says and as a teacher would (arXiv 2107.07651, eq. 7).

    The teacher sees the text with the same words hidden, and counts as much as the objective `momentum` in front of
    this one says. Only samples count that have the text (`modality`) and one at least of `beside`.
    """

    by_subset = False

    def __init__(self, words: Words, beside: Sequence[str], modality: str = "text"):
        super().__init__()
        self.words, self.modality, self.beside = words, modality, [name for name in beside if name != modality]

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        taught = Taught.of(encoded)
        wanted = set(self.beside)
        rows = [row for row, has in enumerate(batch.present()) if self.modality in has and has & wanted]
        if not rows:
            return {"loss": ranks.shared_mean(untouched(model.heads[self.words.head]), 0)} if ranks.active() else {}
        items = batch.only([self.modality]).select(rows).inputs[self.modality]
        # Of an evaluation each batch is hidden alike, so that one epoch's numbers can be compared with another's.
        generator = None if self.training else Generator().manual_seed(0)
        riddle = self.words.hide(model.encoders[self.modality], items, generator)
        said = self._guess(model, encoded, rows, riddle)
        with torch.no_grad():
            told = self._guess(taught.model, taught.encoded, rows, riddle)
        total = distilled_tokens(said, riddle.answer, told, taught.weight)
        return {"loss": ranks.shared_mean(total, len(said))}

    def _guess(self, model: Model, encoded: Encoded, rows: Sequence[int], riddle: Riddle) -> Float[Tensor, "m V"]:
        """What a model says in the places of the words that are hidden."""
        text = model.encoders[self.modality](riddle.items, len(rows))
        others = {name: take(encoded[name], rows) for name in self.beside if name in encoded}
        fused = model.fuse(Encoded({self.modality: text, **others}, len(rows)))
        where, token = find(fused, self.modality, text.layout)
        place = torch.from_numpy(token.argsort()).to(where.device, non_blocking=True)[riddle.cells]
        return model.heads[self.words.head](fused.x.flatten(0, 1).index_select(0, where[place]))
