"""Bring the embeddings of one sample's modalities together and those of different samples apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, permutations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.model import Encoded, Model
from mmformer.objectives.objective import Objective, letters

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def info_nce(
    a: Float[Tensor, "N D"], b: Float[Tensor, "N D"], scale: Float[Tensor, ""], bias: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Cross-entropy of picking each row's partner among all rows, both ways (CLIP, arXiv 2103.00020); no bias."""
    logits = scale * a @ b.T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid(
    a: Float[Tensor, "N D"], b: Float[Tensor, "N D"], scale: Float[Tensor, ""], bias: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Each pair on its own, a match or not, summed over the pairs of a row (SigLIP, arXiv 2303.15343, algorithm 1)."""
    logits = scale * a @ b.T + bias
    sign = 2 * torch.eye(len(a), device=a.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(a)


class Contrastive(Objective):
    """A contrastive loss over every pair of `modalities`, on the samples that have both; the mean over pairs.

    The model's head of a modality's name embeds it and must give unit vectors. `loss` is `info_nce` or `sigmoid`, or
    a function like them. The scale is learned from `scale` on, up to 100, and so is the bias where one is given.

    Raises:
        ValueError: fewer than two modalities.
    """

    headline = ("mean_recall", "max")
    by_subset = False  # a modality is embedded from itself alone

    def __init__(self, modalities: Sequence[str], loss: PairLoss, scale: float, bias: float | None = None):
        super().__init__()
        if len(modalities) < 2:
            raise ValueError(f"contrastive over {list(modalities)}: name at least two modalities")
        self.modalities, self.loss = list(modalities), loss
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(bias or 0.0), requires_grad=bias is not None)

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        found = self._embed(model, encoded)
        rows = {name: set(batch.inputs[name].rows) for name in found}
        scale = self.log_scale.exp().clamp(max=100)
        losses = {}
        for one, other in combinations(found, 2):
            both = sorted(rows[one] & rows[other])
            if len(both) < 2:
                continue  # a single pair has nothing to be told apart from
            index = torch.tensor(both, device=found[one].device)
            losses[f"{one}_{other}"] = self.loss(found[one][index], found[other][index], scale, self.bias)
        return {name: loss / len(losses) for name, loss in losses.items()}

    def _embed(self, model: Model, encoded: Encoded) -> dict[str, Float[Tensor, "N D"]]:
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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
