"""What every training objective is: losses, what it predicts, and how that is judged."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.model import Encoded, Model

_ORDER = ("text", "image", "audio")


@runtime_checkable
class Meter(Protocol):
    """Gathers predictions over a split and turns them into numbers."""

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None: ...

    def compute(self) -> dict[str, float]: ...


def letters(modalities: Sequence[str]) -> dict[str, str]:
    """One letter for each modality, in the order text, image, audio, others: its first that is still free."""
    ordered = [m for m in _ORDER if m in modalities] + sorted(set(modalities) - set(_ORDER))
    out: dict[str, str] = {}
    for name in ordered:
        free = (c for c in (*name.lower(), *"abcdefghijklmnopqrstuvwxyz0123456789") if c.isalnum())
        out[name] = next(c for c in free if c not in out.values())
    return out


class Objective(nn.Module):
    """A loss over a model: it may fuse, use the model's heads and hold state of its own (queues, temperatures).

    `headline` is the metric of its meter that the best checkpoint is chosen by, and whether it should become "min" or
    "max"; None leaves that to the loss. `by_subset` says whether what it predicts depends on which modalities a sample
    has, so that it is worth judging for each subset of them. `needs_encoded` is False for one that encodes what it
    needs in training itself.
    """

    headline: ClassVar[tuple[str, Literal["min", "max"]] | None] = None
    by_subset: ClassVar[bool] = True
    needs_encoded: bool = True

    def prepare(self, model: Model) -> None:
        """Called once, when the weights are loaded and before an optimizer is made: the time to copy from the model."""

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Named scalar losses; empty when no sample of the batch has what the objective needs."""
        raise NotImplementedError

    def advance(self, model: Model) -> None:
        """Called after every step of the optimizer, however many batches it gathered: queues and averages move on."""

    def exported(self) -> Objective:
        """What is saved with a trained model: itself, or a copy without the parts that only training needs."""
        return self

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """What it predicts, each with a row for every sample; empty for an objective that only trains."""
        return {}

    def meter(self) -> Meter | None:
        """A fresh meter for its predictions; None for an objective that only trains."""
        return None


Kind = TypeVar("Kind", bound=Objective)


def without(objective: Kind, *parts: str) -> Kind:
    """A shallow copy that shares all but these parts, which are None."""
    bare = copy(objective)
    bare._modules = {name: part for name, part in objective._modules.items() if name not in parts}
    for name in parts:
        setattr(bare, name, None)
    return bare
