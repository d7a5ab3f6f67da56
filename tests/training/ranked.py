"""One step of training by two processes beside the same step by one: loss and gradients of the same samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from mmformer.batch import Batch
from mmformer.model import Model
from mmformer.objectives import Objective
from mmformer.training.module import Training
from mmformer.training.quiet import silence
from mmformer.training.weighting import Weight


@dataclass
class Case:
    """A model without dropout, its objectives, a batch, and which rows of it each process has."""

    model: Model
    objectives: dict[str, Objective]
    batch: Batch
    rows: tuple[list[int], list[int]]
    weights: dict[str, Weight]


class Watched(Training):
    """Keeps the loss and the gradients of its step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.loss = loss.detach()
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


class OneBatch(pl.LightningDataModule):
    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch], batch_size=None)  # pyright: ignore[reportArgumentType]

    val_dataloader = train_dataloader  # not asked: Lightning only warns where there is none

    def batches_per_epoch(self) -> int:
        return 1


def step(case: Case, batch: Batch, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of one step."""
    silence()
    module = Watched(
        case.model, case.objectives, case.weights, lambda m: SGD(m.parameters(), lr=0.1),
        lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1.0), seed=0, ema=None,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=OneBatch(batch))
    return module.loss, module.found


def share(cases: Callable[[], dict[str, Case]]) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """What one of two processes makes of its rows."""
    found = {}
    for name, case in cases().items():
        strategy = DDPStrategy(process_group_backend="gloo")
        found[name] = step(case, case.batch.select(case.rows[dist.get_rank()]), devices=2, strategy=strategy)
    return found


def assert_equal(case: Case, shares: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
    """The mean of the processes' losses, and the gradients of each, are those of one process with all samples."""
    loss, wanted = step(case, case.batch, devices=1)
    torch.testing.assert_close(torch.stack([found for found, _ in shares]).mean(), loss, rtol=1e-5, atol=0)
    for _, gradients in shares:
        assert not set(wanted) - set(gradients)
        for name, gradient in gradients.items():
            expected = wanted.get(name, torch.zeros_like(gradient))
            error, size = (gradient - expected).norm(), expected.norm()
            assert error <= 1e-5 * size + 1e-7, f"{name}: {error:.1e} of {size:.1e}"
