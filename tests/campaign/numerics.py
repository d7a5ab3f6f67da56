"""NaN and infinity in inputs, targets, weights, gradients and losses, under each policy of the guard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback

from mmformer.batch import Batch, Ragged
from mmformer.encoders import Encoder, mel_patches
from mmformer.fusion import Fusion
from mmformer.heads import Head
from mmformer.model import Model
from mmformer.nn import Attention, Block, Transformer
from mmformer.objectives import Number
from mmformer.objectives.objective import Objective
from mmformer.pooling import MeanPool
from mmformer.training.guard import Guard, Policy, Rollback, Skip, Stop
from mmformer.training.module import NonFiniteLoss, Training
from tests.campaign.trials import Outcome, attempt, folder, in_fork, part
from tests.training.toy import Toy, ToySplit, toy_trainer, toy_training

BAD = "row-12"  # has a picture, no text in the way; index 12
STEPS, WEIGHT_STEP = 14, 6
POLICIES: dict[str, Callable[[], Policy]] = {"stop": Stop, "skip": lambda: Skip(limit=4), "rollback": Rollback}


class Split(ToySplit):
    """The toy's samples with a sound and a number each; one row of one split is broken in one place."""

    def __init__(self, size: int, train: bool, kind: str) -> None:
        super().__init__(size, train)
        self.kind = kind

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        batch = super().__getitems__(keys)
        sounds = [torch.full((4, 5), 0.1 * (index % 7)) for index in batch.indices]
        numbers = torch.tensor([float(index % 3) for index in batch.indices])
        inputs = dict(batch.inputs)
        if BAD in batch.ids and self.train:
            row = batch.ids.index(BAD)
            if self.kind == "audio":
                sounds[row][1, 2] = math.nan
            if self.kind == "label":
                numbers[row] = math.inf
            if self.kind in ("image", "AMP") and "image" in inputs:
                inputs["image"] = _poisoned(inputs["image"], row)
        inputs["audio"] = Ragged.stack(sounds, range(len(sounds)), 1)
        targets = {"label": batch.targets["label"], "number": numbers}
        if self.kind == "nothing to learn" and self.train:
            targets = {"label": torch.full_like(targets["label"], -100), "number": torch.full_like(numbers, math.nan)}
        return replace(batch, inputs=inputs, targets=targets)


def _poisoned(part_: Ragged, row: int) -> Ragged:
    items = [(r, item.float()) for r, item in part_.items()]
    for r, item in items:
        if r == row:
            item[0, 0, 0] = math.nan
    return Ragged.stack([item for _, item in items], [r for r, _ in items], 1)


class Poison(Objective):
    """Harmless but for one row, whose loss, or only whose gradient, is not finite."""

    def __init__(self, gradient: bool) -> None:
        super().__init__()
        self.gradient = gradient

    def forward(self, model: Any, encoded: Any, batch: Batch) -> dict[str, torch.Tensor]:
        value = next(model.parameters()).sum()
        if BAD not in batch.ids or not model.training:
            return {"loss": value * 0.0}
        return {"loss": (value - value.detach()).abs().sqrt() if self.gradient else value * math.nan}


class BreakWeight(Callback):
    """Makes a weight NaN before one step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Training, *_: Any) -> None:
        if trainer.global_step == WEIGHT_STEP and not getattr(self, "done", False):
            self.done = True
            with torch.no_grad():
                pl_module.model.heads["answer"].out.weight[0, 0] = math.nan


def made(kind: str) -> Training:
    module = toy_training()
    torch.manual_seed(7)
    layer = partial(Block, attention=partial(Attention, num_heads=2), dropout=0.1)
    stream = ["latent", "text", "image", "audio"]
    fusion = Fusion(16, stream, Transformer(16, 1, [layer]), MeanPool(["latent"]), num_latents=1)
    encoders = {**dict(module.model.encoders.items()), "audio": Encoder(mel_patches(16, 5, 4))}
    module.model = Model(encoders, fusion, {"answer": Head(16, 3), "number": Head(16, 1)})
    module.objectives["number"] = Number("number", "number")
    if kind in ("loss term", "gradient"):
        module.objectives["poison"] = Poison(kind == "gradient")
    return module


KINDS = ("image", "audio", "label", "weight", "gradient", "loss term", "AMP", "nothing to learn")


def fit(place: Path, kind: str, policy: str) -> tuple[str, bool, list[dict[str, Any]]]:
    """Train with one thing broken: what it ended with, whether the weights are finite, and what was written."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = Toy()
    data.splits = {name: Split(44, name == "train", kind) for name in ("train", "val")}
    data.setup = lambda stage=None: None  # type: ignore[method-assign]
    module = made(kind)
    guard = Guard(str(place / "nonfinite"), str(place / "checkpoints" / "last.ckpt"), POLICIES[policy](), None)
    callbacks = [guard, *([BreakWeight()] if kind == "weight" else [])]
    options = {"precision": "bf16-mixed"} if kind == "AMP" else {}
    trainer = toy_trainer(place, steps=STEPS, callbacks=callbacks, every_n_steps=2, **options)
    said = ""
    try:
        trainer.fit(module, datamodule=data)
    except NonFiniteLoss as error:
        said = str(error)
    finite = all(bool(p.isfinite().all()) for p in module.parameters())
    written = [json.loads(path.read_text()) for path in sorted((place / "nonfinite").glob("*.json"))]
    return said, finite, written


def one(place: Path, kind: str, policy: str) -> str | None:
    said, finite, written = in_fork(partial(fit, place, kind, policy))
    if kind == "nothing to learn":
        return None if not said and finite and not written else f"{said}, finite {finite}, {written}"
    if not written:
        return f"nothing was written: {said}"
    wrong = [report for report in written if not _named(report, kind)]
    if wrong:
        return f"named otherwise: {wrong[0]}"
    ends = policy == "stop" or (kind == "weight" and policy == "skip")  # a weight stays as it is
    if bool(said) != ends:
        return f"ended with {said!r}"
    if policy == "stop" and (kind == "weight") == (BAD in said):
        return f"said otherwise: {said}"
    return None if finite or (kind == "weight" and policy != "rollback") else "weights that are not finite"


def _named(report: dict[str, Any], kind: str) -> bool:
    if kind == "weight":
        return report["weights"] == ["model.heads.answer.out.weight"] and not report["rows"]
    inputs = {"image": {"image": [BAD]}, "AMP": {"image": [BAD]}, "audio": {"audio": [BAD]}, "label": {"number": [BAD]}}
    return report["rows"] == [BAD] and report["inputs"] == inputs.get(kind, {})


def trials(share: float, seed: int) -> Iterator[Outcome]:
    """24: 8 kinds under 3 policies."""
    with folder("N1") as root:
        for i, (kind, policy) in enumerate(part([(kind, policy) for kind in KINDS for policy in POLICIES], share)):
            place = root / f"{i}"
            place.mkdir()
            yield attempt(f"{kind}, {policy}", partial(one, place, kind, policy))
