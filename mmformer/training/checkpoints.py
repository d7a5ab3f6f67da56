"""When a checkpoint is written, and what of Lightning's loops is written into it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from mmformer.training.checkpointing import CheckpointError, clean, keep_previous
from mmformer.training.interruption import Interrupted, Signals
from mmformer.training.module import Training


class Checkpoints(Checkpoint):
    """Keep `best.ckpt` by `monitor`, and `last.ckpt` every `every_n_steps` and before each validation.

    `previous.ckpt` is what `last.ckpt` was before, should that be damaged. Nothing is written in the middle of an
    accumulation: a resumed run repeats no gradient and loses none. SIGTERM, Ctrl-C or a file `STOP` beside the folder
    end the run after the step, with `last.ckpt` written.
    """

    def __init__(self, folder: str, monitor: str | None, mode: str, every_n_steps: int | None) -> None:
        super().__init__()
        if mode not in ("min", "max"):
            raise ValueError(f"mode is {mode!r}: say whether {monitor} should become min or max")
        self.folder = Path(folder)
        self.monitor, self.mode, self.every_n_steps = monitor, mode, every_n_steps
        self.best_score: float | None = None
        self._saved_at = self._validated_at = -1
        self._validation: str | None = None
        """Of the step just made: "due", "done", or None where no validation belongs to it."""
        self._signals = Signals(self.folder.parent / "STOP")

    @property
    def last_path(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        return self.folder / "best.ckpt"

    @property
    def best_model_path(self) -> str:
        """What Lightning and its loggers call the best checkpoint; empty while there is none."""
        return str(self.best_path) if self.best_score is not None and self.best_path.is_file() else ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not _is_trial(trainer):
            self.folder.mkdir(parents=True, exist_ok=True)
            clean(self.folder)
            _check_space(self.folder, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        if _is_trial(trainer) or loop._should_accumulate():
            return
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self._validation = "due" if loop._should_check_val_fx(fetcher) else None
        by_step = self.every_n_steps and (trainer.global_step % self.every_n_steps == 0)
        stop = self._stop(trainer)
        at_end = loop.batch_progress.is_last_batch or trainer.global_step == trainer.max_steps
        if stop or by_step or self._validation or at_end:
            self.save_last(trainer)
        if stop:
            raise Interrupted(stop)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if stop := self._stop(trainer):  # what there is to save was saved before the validation
            raise Interrupted(stop)

    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if stop := self._stop(trainer):
            raise Interrupted(stop)

    def _stop(self, trainer: pl.Trainer) -> int:
        """The signal to stop by, 0 for none; every process stops at the same step."""
        mine = self._signals.received()
        if trainer.world_size == 1:
            return mine
        return int(trainer.strategy.reduce(torch.tensor(mine, device=trainer.strategy.root_device), reduce_op="max"))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signals.install()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signals.install()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._signals.restore()

    def save_last(self, trainer: pl.Trainer) -> None:
        if self._saved_at == trainer.global_step:
            return
        if trainer.is_global_zero:
            keep_previous(self.last_path)
        trainer.save_checkpoint(self.last_path)
        self._saved_at = trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._validation = "done"
            self._keep_best(trainer)

    def finish(self, trainer: pl.Trainer, module: Training, data: pl.LightningDataModule) -> None:
        """Validate the last step too, where training ended between two validations."""
        if self._validated_at == trainer.global_step or _is_trial(trainer):
            return
        module.by_subset = False  # as in the validations of the training, whose rows this one continues
        trainer.validate(module, datamodule=data, verbose=False)
        module.by_subset = True
        module.record(module.measured, trainer.global_step)
        self._keep_best(trainer)

    def _keep_best(self, trainer: pl.Trainer) -> None:
        self._validated_at = trainer.global_step
        if self.monitor is None or _is_trial(trainer):
            return
        if self.monitor not in trainer.callback_metrics:
            found = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"callbacks.checkpoints.monitor={self.monitor} is not measured; there are: {found}")
        score = float(trainer.callback_metrics[self.monitor])
        if self._improves(score):
            self.best_score = score
            trainer.save_checkpoint(self.best_path)

    def _improves(self, score: float) -> bool:
        if math.isnan(score):
            return False
        if self.best_score is None:
            return True
        return score > self.best_score if self.mode == "max" else score < self.best_score

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "validated_at": self._validated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self._validated_at = state_dict["best_score"], state_dict["validated_at"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint["versions"] = versions()
        _settle(checkpoint["loops"]["fit_loop"], self._validation, trainer.global_step)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """The versions of what decides the numbers of a run."""
    found = {}
    for name in ("mmformer", "torch", "pytorch-lightning"):
        with suppress(PackageNotFoundError):  # run from a checkout that is not installed
            found[name] = version(name)
    return found


def other_versions(checkpoint: Mapping[str, Any]) -> list[str]:
    """What has another version than when a checkpoint was written, as `torch 2.13.0 -> 2.14.1`."""
    now = versions()
    return [f"{n} {old} -> {now[n]}" for n, old in checkpoint.get("versions", {}).items() if now.get(n, old) != old]


def _is_trial(trainer: Any) -> bool:
    return bool(trainer.fast_dev_run)


def _settle(loops: dict[str, Any], validation: str | None, step: int) -> None:
    """Write Lightning's progress as it stands between two batches, whichever hook the checkpoint was saved in.

    Lightning 2.6.6 tells from these counters where to go on, and skips the validation of an epoch, or counts an epoch
    twice, when a checkpoint was saved in the hook after a batch. Between two batches there are only two cases: train
    the next batch, or validate first, which a validation that was started and not finished (`started` is one ahead)
    makes it do.
    """
    batch = loops["epoch_loop.batch_progress"]
    for count in (batch["total"], batch["current"]):
        count["completed"] = count["processed"] = count["started"] = count["ready"]
    none = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    begun = none | {"ready": 1, "started": 1} if validation == "due" else none
    loops["epoch_loop.val_loop.batch_progress"] |= {"total": dict(begun), "current": dict(none), "is_last_batch": False}
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1 if validation else step


def _check_space(folder: Path, module: pl.LightningModule) -> None:
    """Refuse to start where the first checkpoints cannot fit: weights, two moments of each, and three files of them."""
    bytes_of = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in module.parameters())
    needed, free = 3 * bytes_of / 1e6, shutil.disk_usage(folder).free / 1e6
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free:.0f} MB free, and the checkpoints of this run need about {needed:.0f} MB:"
            " free some space, or set paths.runs to another disk"
        )
