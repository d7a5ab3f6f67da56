"""Predict a target of each sample: one class, several classes, or a number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmformer.batch import Batch
from mmformer.metrics.tagging import average_precision_by_class
from mmformer.model import Encoded, Model
from mmformer.objectives.objective import Objective
from mmformer.objectives.ranks import nothing, shared_mean


def _readable(model: Model, encoded: Encoded, source: str | None) -> bool:
    """Whether some sample may have what a head reads; in a share of a batch none may."""
    return encoded.num_samples > 0 and (source is None or source in encoded or source in model.views)


def _logits(model: Model, encoded: Encoded, head: str, source: str | None) -> dict[str, Tensor]:
    logits, present = model.output(encoded, head, source)
    return {"logits": logits.float(), "present": present}


class Classes(Objective):
    """One of several classes, by cross-entropy.

    `head` of the model reads the fused vector, or the mean of one modality where `source` names it. Samples without
    the target or without the source count for nothing.
    """

    headline = ("acc", "max")

    def __init__(self, head: str, target: str, source: str | None = None, smoothing: float = 0.0):
        super().__init__()
        self.head, self.target, self.source, self.smoothing = head, target, source, smoothing

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        if not _readable(model, encoded, self.source):
            return {"loss": shared_mean(nothing(model), 0)}
        logits, present = model.output(encoded, self.head, self.source)
        target = torch.where(present, batch.targets[self.target], -100)
        total = F.cross_entropy(
            logits.float(), target, ignore_index=-100, label_smoothing=self.smoothing, reduction="sum"
        )
        return {"loss": shared_mean(total, (target != -100).sum())}

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        return _logits(model, encoded, self.head, self.source)

    def meter(self) -> ClassMeter:
        return ClassMeter(self.target)


class ClassMeter:
    """Accuracy (`acc`) and the mean F1 score over the classes that occur (`f1`)."""

    def __init__(self, target: str):
        self.target = target
        self.predicted: list[Int[Tensor, " n"]] = []
        self.wanted: list[Int[Tensor, " n"]] = []

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None:
        wanted = batch.targets[self.target]
        kept = (wanted != -100) & prediction["present"]
        self.predicted.append(prediction["logits"].argmax(-1)[kept].cpu())
        self.wanted.append(wanted[kept].cpu())

    def compute(self) -> dict[str, float]:
        predicted, wanted = torch.cat(self.predicted or [torch.empty(0)]), torch.cat(self.wanted or [torch.empty(0)])
        if not len(wanted):
            return {}
        scores = []
        for label in torch.cat([predicted, wanted]).unique():
            hits = int(((predicted == label) & (wanted == label)).sum())
            scores.append(2 * hits / int((predicted == label).sum() + (wanted == label).sum()))
        return {"acc": float((predicted == wanted).double().mean()), "f1": sum(scores) / len(scores)}


class Labels(Objective):
    """Any number of classes at once, by binary cross-entropy; NaN in the target leaves that class out of the loss."""

    headline = ("map", "max")

    def __init__(self, head: str, target: str, source: str | None = None):
        super().__init__()
        self.head, self.target, self.source = head, target, source

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        if not _readable(model, encoded, self.source):
            return {"loss": shared_mean(nothing(model), 0)}
        logits, present = model.output(encoded, self.head, self.source)
        target = batch.targets[self.target]
        known = ~target.isnan() & present[:, None]
        losses = F.binary_cross_entropy_with_logits(logits.float(), target.nan_to_num(), reduction="none")
        return {"loss": shared_mean((losses * known).sum(), known.sum())}

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        return _logits(model, encoded, self.head, self.source)

    def meter(self) -> LabelMeter:
        return LabelMeter(self.target)


class LabelMeter:
    """Mean average precision over the classes (`map`) and F1 over all decisions at one half (`f1`)."""

    def __init__(self, target: str):
        self.target = target
        self.scores: list[Float[Tensor, "n C"]] = []
        self.wanted: list[Float[Tensor, "n C"]] = []

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None:
        present = prediction["present"]
        self.scores.append(prediction["logits"][present].cpu())
        self.wanted.append(batch.targets[self.target][present].cpu())

    def compute(self) -> dict[str, float]:
        scores, wanted = torch.cat(self.scores or [torch.empty(0, 0)]), torch.cat(self.wanted or [torch.empty(0, 0)])
        if not wanted.numel():
            return {}
        precisions = average_precision_by_class(scores, wanted)
        precisions = precisions[~precisions.isnan()]
        known = ~wanted.isnan()
        said, true = (scores > 0)[known], (wanted > 0.5)[known]
        f1 = 2 * int((said & true).sum()) / max(1, int(said.sum() + true.sum()))
        return {"map": float(precisions.mean()) if len(precisions) else 0.0, "f1": f1}


class Number(Objective):
    """A number, by mean squared error in units of the head's standard deviation."""

    headline = ("mae", "min")

    def __init__(self, head: str, target: str, source: str | None = None):
        super().__init__()
        self.head, self.target, self.source = head, target, source

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        if not _readable(model, encoded, self.source):
            return {"loss": shared_mean(nothing(model), 0)}
        value, present = model.output(encoded, self.head, self.source)
        target = batch.targets[self.target]
        known = ~target.isnan() & present
        error = ((value[:, 0].float() - target.nan_to_num()) / getattr(model.heads[self.head], "std", 1.0)) ** 2
        return {"loss": shared_mean((error * known).sum(), known.sum())}

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        value, present = model.output(encoded, self.head, self.source)
        return {"value": value[:, 0].float(), "present": present}

    def meter(self) -> NumberMeter:
        return NumberMeter(self.target)


class NumberMeter:
    """Mean absolute error (`mae`), root mean squared error (`rmse`) and explained variance (`r2`)."""

    def __init__(self, target: str):
        self.target = target
        self.predicted: list[Float[Tensor, " n"]] = []
        self.wanted: list[Float[Tensor, " n"]] = []

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None:
        wanted = batch.targets[self.target]
        kept = ~wanted.isnan() & prediction["present"]
        self.predicted.append(prediction["value"][kept].cpu())
        self.wanted.append(wanted[kept].cpu())

    def compute(self) -> dict[str, float]:
        predicted = torch.cat(self.predicted or [torch.empty(0)]).double()
        wanted = torch.cat(self.wanted or [torch.empty(0)]).double()
        if not len(wanted):
            return {}
        squared = ((predicted - wanted) ** 2).mean()
        spread = ((wanted - wanted.mean()) ** 2).mean().clamp(min=1e-12)
        return {
            "mae": float((predicted - wanted).abs().mean()),
            "rmse": float(squared.sqrt()),
            "r2": float(1 - squared / spread),
        }
