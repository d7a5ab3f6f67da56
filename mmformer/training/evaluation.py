"""Judging a model on every subset of its modalities, with one encoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from mmformer.batch import Batch
from mmformer.model import Encoded, Model
from mmformer.objectives.objective import Meter, Objective, letters
from mmformer.tokens import LATENT

Judged = tuple[str, str, dict[str, Tensor], Batch]
"""Objective, subset ("" for samples as they are), what was predicted, and the samples it was predicted for."""


def subsets(modalities: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Every non-empty subset of the modalities, by its letters: t, i, a, ti, ta, ia, tia."""
    letter = letters(modalities)
    chosen = (c for size in range(1, len(letter) + 1) for c in combinations(letter, size))
    return {"".join(letter[m] for m in names): names for names in chosen}


class Evaluation:
    """Meters of all objectives over one split, for samples as they are and, by choice, for each subset."""

    def __init__(self, objectives: Mapping[str, Objective], modalities: Sequence[str], by_subset: bool) -> None:
        self._fresh = {name: objective.meter for name, objective in objectives.items()}
        self._subsets = subsets(modalities) if by_subset else {}
        self._meters: dict[tuple[str, str], Meter] = {}

    def judge(
        self, objectives: Mapping[str, Objective], model: Model, encoded: Encoded, batch: Batch
    ) -> Iterator[Judged]:
        """Predict for the samples as they are, then for each subset on the samples that have all of it."""
        bare = replace(batch, inputs={})
        have = batch.present()
        kept: dict[str, Encoded] = {}  # one for all objectives, which share what is fused of it
        for name, objective in objectives.items():
            whole = objective.predict(model, encoded, batch)
            if not whole:
                continue
            yield name, "", whole, bare
            for letter, names in self._subsets.items() if objective.by_subset else ():
                rows = [row for row, has in enumerate(have) if has.issuperset(names)]
                if not rows or not _reads(model, names):
                    continue
                if letter not in kept:
                    kept[letter] = encoded.only(names)
                same = len(kept[letter]) == len(encoded)
                found = whole if same else objective.predict(model, kept[letter], batch.only(names))
                yield name, letter, _rows(found, rows), bare.select(rows)

    def update(self, judged: Sequence[Judged]) -> None:
        for name, letter, prediction, batch in judged:
            if (name, letter) not in self._meters:
                meter = self._fresh[name]()
                if meter is None:
                    continue
                self._meters[name, letter] = meter
            self._meters[name, letter].update(prediction, batch)

    def compute(self) -> dict[str, float]:
        """Metrics by name: `acc`, `acc_ti`. The first objective owns a plain name, a later one puts its own before."""
        owner: dict[str, str] = {}
        out: dict[str, float] = {}
        order = list(self._fresh)
        letter_order = ["", *self._subsets]
        by_place = sorted(self._meters.items(), key=lambda m: (order.index(m[0][0]), letter_order.index(m[0][1])))
        for (name, letter), meter in by_place:
            for metric, value in meter.compute().items():
                plain = owner.setdefault(metric, name) == name
                key = metric if plain else f"{name}_{metric}"
                out[f"{key}_{letter}" if letter else key] = float(value)
        return out


def _reads(model: Model, names: Sequence[str]) -> bool:
    """Whether the fusion has a token to work on when a sample has only these modalities."""
    return model.fusion is None or bool({LATENT, *names}.intersection(model.fusion.stream))


def _rows(prediction: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    return {key: value[torch.tensor(rows, device=value.device)] for key, value in prediction.items()}
