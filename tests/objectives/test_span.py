"""The penalty on spans, in a model that has some."""

from __future__ import annotations

import pytest
import torch

from mmformer.model import Encoded
from mmformer.nn import AdaptiveSpan
from mmformer.objectives import SpanPenalty
from tests.helpers import random_batch, small_model

SPANS = [0.0, 0.3, 0.62, 1.0]


def test_the_penalty_is_the_mean_span_of_every_layer() -> None:
    model = small_model()
    layers = [AdaptiveSpan(24, 4, max_span=10) for _ in range(2)]
    for block, layer in zip(model.fusion.transformer.layers, layers, strict=True):
        block.attention = layer
    with torch.no_grad():
        layers[0].z.copy_(torch.tensor(SPANS))
        layers[1].z.fill_(2.0)
    penalty, batch = SpanPenalty(0.1), random_batch(3)
    penalty.prepare(model)
    loss = penalty(model, Encoded({}, 3), batch)["loss"]
    assert loss.item() == pytest.approx(0.1 * 10 * (sum(SPANS) / 4 + 1))
    loss.backward()
    torch.testing.assert_close(layers[0].z.grad, torch.full((4,), 0.25))
    penalty.advance(model)
    assert layers[1].z.tolist() == [1.0] * 4
    assert model.fuse(model.encode(batch)).x.isfinite().all()
    with pytest.raises(ValueError, match="no layer of the model learns a span"):
        penalty.prepare(small_model())
