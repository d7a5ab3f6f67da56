"""What keeps learned spans short."""

from __future__ import annotations

import torch
from torch import Tensor

from mmformer.batch import Batch
from mmformer.model import Encoded, Model
from mmformer.nn.span import AdaptiveSpan
from mmformer.objectives.objective import Objective


class SpanPenalty(Objective):
    """`coefficient` times the mean span of the heads, in tokens, summed over all layers of adaptive span.

    The penalty of arXiv 1905.07799, whose parameters are taken back into [0, 1] after each step.

    Raises:
        ValueError: a model without such a layer.
    """

    by_subset = False
    needs_encoded = False

    def __init__(self, coefficient: float):
        super().__init__()
        self.coefficient = coefficient

    def prepare(self, model: Model) -> None:
        if not _layers(model):
            raise ValueError("no layer of the model learns a span: give one an mmformer.nn.AdaptiveSpan (layers=span)")

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        spans = torch.stack([layer.span().mean() for layer in _layers(model)])
        return {"loss": self.coefficient * spans.sum()}

    def advance(self, model: Model) -> None:
        for layer in _layers(model):
            layer.clamp()


def _layers(model: Model) -> list[AdaptiveSpan]:
    return [module for module in model.modules() if isinstance(module, AdaptiveSpan)]
