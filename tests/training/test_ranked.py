"""Two processes train as one does on the same samples, whatever modalities and however many samples each has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmformer.heads import Head, UnitHead
from mmformer.losses.contrastive import info_nce, sigmoid
from mmformer.model import Model
from mmformer.nn import VectorQuantizer
from mmformer.objectives import Classes, Contrastive, Labels, Number, Objective, Reconstruct
from mmformer.objectives.contrastive import Scale
from mmformer.training.weighting import Ramp, Uncertainty, Weight
from tests.helpers import random_batch, scramble, small_model
from tests.processes import both
from tests.test_codec import DIM, picture_codec
from tests.training.ranked import Case, assert_equal, share

NAMES = ["text", "image", "audio"]
APART = random_batch(10, 3, subsets=[("text", "audio"), ("text", "image")])
MIXED = random_batch(14, 4)
SHARES = {
    "disjoint modalities": (APART, ([0, 2, 4, 6, 8], [1, 3, 5])),
    "uneven": (MIXED, ([*range(9)], [*range(9, 14)])),
    "one has nothing": (MIXED, ([], [*range(14)])),
}


def towers() -> Model:
    model = Model(dict(small_model().encoders), None, {name: UnitHead(24, 6) for name in NAMES})
    scramble(model)
    return model


def fused() -> Model:
    model = small_model()
    model.heads.update({"tags": Head(24, 4), "price": Head(24, 1, mean=2.0, std=3.0)})
    scramble(model)
    return model


def kinds() -> dict[str, tuple[Model, dict[str, Objective], dict[str, Weight]]]:
    scales = {"text_image": Scale([7.0, 3.0]), "image_audio": Scale(20.0, learned=False)}
    return {
        "info_nce": (towers(), {"match": Contrastive(NAMES, info_nce, 9.0, same="label", scales=scales)}, {}),
        "sigmoid, in chunks": (
            towers(),
            {"match": Contrastive(NAMES, sigmoid, 9.0, -4.0, anchor="text", chunk=3)},
            {"match": Ramp(start=0.5, stop=1.0, steps=10)},
        ),
        "predictions": (
            fused(),
            {"answer": Classes("answer", "label", smoothing=0.1), "seen": Classes("answer", "label", "image"),
             "tags": Labels("tags", "tags"), "price": Number("price", "price", source="audio")},
            {"answer": Uncertainty(0.7), "price": Uncertainty(2.0, squared=True), "tags": 3},
        ),
        "reconstruction": (
            Model({"image": picture_codec(VectorQuantizer(DIM, 9))}), {"image": Reconstruct("image")}, {}
        ),
    }  # fmt: skip


def cases() -> dict[str, Case]:
    out = {}
    for cut, (batch, rows) in SHARES.items():
        torch.manual_seed(0)  # codebooks are drawn from it
        for kind, (model, objectives, weights) in kinds().items():
            draw = torch.Generator().manual_seed(2)
            tags, price = torch.rand(len(batch), 4, generator=draw).round(), torch.randn(len(batch), generator=draw)
            tags[2], price[1], label = torch.nan, torch.nan, batch.targets["label"].clone()
            label[3] = -100
            full = replace(batch, targets={"label": label, "tags": tags, "price": price})
            used = sorted([*rows[0], *rows[1]])
            place = {row: new for new, row in enumerate(used)}
            mine, yours = ([place[row] for row in part] for part in rows)
            out[f"{kind}: {cut}"] = Case(model, objectives, full.select(used), (mine, yours), weights)
    return out


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return both(share, tmp_path_factory.mktemp("ranked"), cases)


@pytest.mark.parametrize("name", list(cases()))
def test_two_processes_take_the_step_of_one(found: list[dict[str, Any]], name: str) -> None:
    assert_equal(cases()[name], [part[name] for part in found])
