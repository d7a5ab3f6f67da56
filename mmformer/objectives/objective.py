"""What every training objective is: losses, what it predicts, and how that is judged."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.model import Encoded, Model


@runtime_checkable
class Meter(Protocol):
    """Gathers predictions over a split and turns them into numbers."""

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None: ...

    def compute(self) -> dict[str, float]: ...


class Objective(nn.Module):
    """A loss over a model: it may fuse, use the model's heads and hold state of its own (queues, temperatures)."""

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Named scalar losses; empty when no sample of the batch has what the objective needs."""
        raise NotImplementedError

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """What it predicts, each with a row for every sample; empty for an objective that only trains."""
        return {}

    def meter(self) -> Meter | None:
        """A fresh meter for its predictions; None for an objective that only trains."""
        return None
