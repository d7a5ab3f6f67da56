"""Bring the embeddings of one sample's modalities together and those of different samples apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.model import Encoded, Model
from mmformer.objectives.objective import Objective

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


class RetrievalMeter:
    """Recall at 1, 5 and 10 and the mean rank, from each modality to each other one.

    A query finds its own sample; a wrong item with the same score counts as half in front of it. Names are like
    `t2i_r@1`, by the modalities' first letters.
    """

    def __init__(self, modalities: Sequence[str], chunk: int = 1024):
        self.modalities, self.chunk = list(modalities), chunk
        self.rows: dict[str, list[Tensor]] = {name: [] for name in self.modalities}

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None:
        dim = next((value.shape[1] for value in prediction.values()), 0)
        for name in self.modalities:
            rows = prediction.get(name)
            self.rows[name].append(torch.full((len(batch), dim), torch.nan) if rows is None else rows.float().cpu())

    def compute(self) -> dict[str, float]:
        found = {name: torch.cat(rows) for name, rows in self.rows.items() if rows and any(r.shape[1] for r in rows)}
        out: dict[str, float] = {}
        for one, other in combinations(found, 2):
            both = ~(found[one].isnan().any(1) | found[other].isnan().any(1))
            a, b = found[one][both], found[other][both]
            if len(a):
                out |= self._recall(f"{one[0]}2{other[0]}", a, b) | self._recall(f"{other[0]}2{one[0]}", b, a)
        return out

    def _recall(self, name: str, queries: Float[Tensor, "n D"], keys: Float[Tensor, "n D"]) -> dict[str, float]:
        ranks = []
        for start in range(0, len(queries), self.chunk):
            scores = queries[start : start + self.chunk] @ keys.T
            own = scores.diagonal(start)[:, None]
            ranks.append((scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2 + 1)
        rank = torch.cat(ranks)
        recalls = {f"{name}_r@{k}": float((rank <= k).double().mean()) for k in (1, 5, 10)}
        return {**recalls, f"{name}_mean_rank": float(rank.double().mean())}
