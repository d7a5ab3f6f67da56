"""Bring the embeddings of one sample's modalities together and those of different samples apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, permutations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmformer.batch import Batch
from mmformer.losses.contrastive import Peers, info_nce, sigmoid
from mmformer.model import Encoded, Model
from mmformer.objectives import ranks
from mmformer.objectives.objective import Objective, letters
from mmformer.objectives.space import Space

__all__ = ["Contrastive", "PairLoss", "RetrievalMeter", "Scale", "info_nce", "retrieval_ranks", "sigmoid"]


PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Peers], Tensor]
"""A loss of pairs `a[i]`, `b[i]`: of a, b, scale, bias, ids and peers; see `info_nce`."""


class Scale(nn.Module):
    """What cosines are multiplied by: `start`, learned as a logarithm and kept up to `largest`, or fixed.

    Two numbers are one for each direction (CLAP, arXiv 2211.06687).
    """

    def __init__(self, start: float | Sequence[float], learned: bool = True, largest: float = 100.0):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(start, dtype=torch.float32).log(), requires_grad=learned)
        self.largest = largest

    def forward(self) -> Float[Tensor, "*two"]:
        return self.log.exp().clamp(max=self.largest)


class Contrastive(Objective):
    """A contrastive loss over every pair of `modalities`, on the samples that have both; the mean over pairs.

    The model's head of a modality's name embeds it and must give unit vectors. `loss` is `info_nce` or `sigmoid`, or
    a function like them. The scale is learned from `scale` on, up to 100, and so is the bias where one is given.

    `anchor` leaves only the pairs with that modality (ImageBind, arXiv 2305.05665), and `scales` gives pairs
    ("image_audio") a `Scale` of their own. Samples that share the class `same`, a target, are no negatives of one
    another. With `chunk`, that many samples are encoded at a time and once more in the backward pass, so that memory
    grows with the embeddings and not with the encoders (GradCache, arXiv 2101.06983); the gradients are the same. For
    that no other objective may read what is encoded. Leaves the `Space` for objectives behind it, such as `Matching`.

    Raises:
        ValueError: fewer than two modalities, an anchor that is none of them, or a scale of a pair that is none.
    """

    headline = ("mean_recall", "max")
    by_subset = False  # a modality is embedded from itself alone

    def __init__(
        self,
        modalities: Sequence[str],
        loss: PairLoss,
        scale: float,
        bias: float | None = None,
        *,
        anchor: str | None = None,
        scales: Mapping[str, Scale] | None = None,
        same: str | None = None,
        chunk: int | None = None,
    ):
        super().__init__()
        if len(modalities) < 2:
            raise ValueError(f"contrastive over {list(modalities)}: name at least two modalities")
        if anchor is not None and anchor not in modalities:
            raise ValueError(f"anchor {anchor!r} is none of the modalities {list(modalities)}: name one of them")
        self.modalities, self.loss, self.same, self.chunk = list(modalities), loss, same, chunk
        self.pairs = [pair for pair in combinations(modalities, 2) if anchor is None or anchor in pair]
        if unknown := sorted(set(scales or ()) - {"_".join(pair) for pair in self.pairs}):
            raise ValueError(f"scales of {unknown}, but the pairs are {['_'.join(pair) for pair in self.pairs]}")
        self.needs_encoded = chunk is None
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.scales = nn.ModuleDict(scales)
        self.bias = nn.Parameter(torch.tensor(bias or 0.0), requires_grad=bias is not None)

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        found = self._embed(model, encoded, batch)
        encoded.shared[Space] = Space.of(found, found, self.log_scale.exp().clamp(max=100))
        have = {name: set(batch.inputs[name].rows) for name in found}
        missing = ranks.nothing(model).new_zeros(0, 0)
        losses = {}
        for one, other in self.pairs:  # all of them: another process may have what this one lacks
            rows = sorted(have.get(one, set()) & have.get(other, set()))
            counts = ranks.shares(len(rows))
            if sum(counts) < 2:
                continue  # a single pair has nothing to be told apart from
            a, b = ((found[name][rows] if rows else missing) for name in (one, other))
            peers = ranks.peers(counts)
            losses[f"{one}_{other}"] = self.loss(
                a, b, self.scale(one, other), self.bias, self._ids(batch, rows, peers.start, a.device), peers
            )
        return {name: loss / len(losses) for name, loss in losses.items()}

    def scale(self, one: str, other: str) -> Float[Tensor, "*two"]:
        """What the cosines of a pair of modalities are multiplied by."""
        name = f"{one}_{other}"
        return self.scales[name]() if name in self.scales else self.log_scale.exp().clamp(max=100)

    def _ids(self, batch: Batch, rows: list[int], start: int, device: torch.device) -> Int[Tensor, " n"] | None:
        """The class of each row, and a number of its own for a row without one."""
        if self.same is None:
            return None
        own = -1 - torch.arange(start, start + len(rows), device=device)
        return torch.where(batch.targets[self.same][rows] < 0, own, batch.targets[self.same][rows]) if rows else own

    def _embed(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Float[Tensor, "N D"]]:
        if encoded or self.chunk is None:
            return self._vectors(model, encoded)
        everyone = range(len(batch))
        parts = [
            checkpoint(self._encode, model, batch.select(everyone[i : i + self.chunk]), use_reentrant=False)
            for i in range(0, len(batch), self.chunk)
        ]
        sizes = [min(self.chunk, len(batch) - i) for i in range(0, len(batch), self.chunk)]
        return {name: _stack([part.get(name) for part in parts], sizes) for name in self.modalities
                if any(name in part for part in parts)}  # fmt: skip

    def _encode(self, model: Model, batch: Batch) -> dict[str, Float[Tensor, "N D"]]:
        return self._vectors(model, model.encode(batch))

    def _vectors(self, model: Model, encoded: Encoded) -> dict[str, Float[Tensor, "N D"]]:
        return {name: model.output(encoded, name, source=name)[0] for name in self.modalities if name in encoded}

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Unit vectors `<modality>`, NaN where a sample lacks it."""
        out = {}
        for name in self.modalities:
            if name in encoded:
                vector, present = model.output(encoded, name, source=name)
                out[name] = torch.where(present[:, None], vector, torch.nan)
        return out

    def meter(self) -> RetrievalMeter:
        return RetrievalMeter(self.modalities)


RECALL_AT = (1, 5, 10)


class RetrievalMeter:
    """Retrieval from each modality to each other one, among the samples of the split that have both.

    Metrics by direction, such as text to image: the share of queries that find their own sample among the first 1, 5
    and 10 (`t2i_r@1`, ...) and the median of the ranks at which they find it (`t2i_median_rank`). Over all directions:
    the mean recall at each cut (`r@1`, ...) and the mean of all recalls (`mean_recall`, which is RSUM divided by its
    number of terms). A retrieval by chance among n samples has r@k = k / n and a median rank of (n + 1) / 2.
    """

    def __init__(self, modalities: Sequence[str], chunk: int = 1024):
        self.modalities, self.chunk = list(modalities), chunk
        self._rows: dict[str, list[Tensor]] = {name: [] for name in self.modalities}

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None:
        dim = next((value.shape[1] for value in prediction.values()), 0)
        for name in self.modalities:
            rows = prediction.get(name)
            self._rows[name].append(torch.full((len(batch), dim), torch.nan) if rows is None else rows.float().cpu())

    def embeddings(self) -> dict[str, Float[Tensor, "N D"]]:
        """Of every sample so far by modality, NaN where it lacks it; without modalities that no sample has."""
        dim = max((part.shape[1] for parts in self._rows.values() for part in parts), default=0)
        joined = {
            name: torch.cat([part if part.shape[1] else part.new_full((len(part), dim), torch.nan) for part in parts])
            for name, parts in self._rows.items()
            if parts
        }
        return {name: rows for name, rows in joined.items() if not rows.isnan().all()}

    def compute(self) -> dict[str, float]:
        letter = letters(self.modalities)
        found, recalls, medians = self.embeddings(), {}, {}
        for one, other in permutations(filter(found.__contains__, letter), 2):
            both = ~(found[one].isnan().any(1) | found[other].isnan().any(1))
            if both.any():
                ranks = retrieval_ranks(found[one][both], found[other][both], self.chunk)
                direction = f"{letter[one]}2{letter[other]}"
                recalls |= {(direction, k): float((ranks <= k).double().mean()) for k in RECALL_AT}
                medians[f"{direction}_median_rank"] = float(ranks.double().quantile(0.5))
        if not recalls:
            return {}
        means = {f"r@{k}": _mean([value for (_, at), value in recalls.items() if at == k]) for k in RECALL_AT}
        single = {f"{direction}_r@{k}": value for (direction, k), value in recalls.items()}
        return {"mean_recall": _mean(list(recalls.values()))} | means | single | medians


def retrieval_ranks(
    queries: Float[Tensor, "N D"], keys: Float[Tensor, "N D"], chunk: int = 1024
) -> Float[Tensor, " N"]:
    """At which rank, from 1, each query finds the key of its own row; `chunk` queries are scored at a time.

    The rank is 1 + the keys that score higher + half the others that score the same, so that a model that gives all
    keys one score is judged as chance is, and not by the order of the rows.
    """
    ranks = []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ keys.T
        own = scores.diagonal(start)[:, None]
        ranks.append((scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2 + 1)
    return torch.cat(ranks)


def _stack(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Float[Tensor, "N D"]:
    """Parts one after another, zeros for one that is None."""
    like = next(part for part in parts if part is not None)
    filled = [
        like.new_zeros(size, like.shape[1]) if part is None else part for part, size in zip(parts, sizes, strict=True)
    ]
    return torch.cat(filled)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
