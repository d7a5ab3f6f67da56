"""What a run shows while it trains: one line that moves in a terminal, one line an epoch in a file."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TextColumn

from mmformer.training.throughput import throughput_of

_MOST_METRICS = 8  # the first are the important ones; the others stand in metrics.csv


class ProgressLine(ProgressBar):
    """Step, loss, what `Throughput` measures where that is among the callbacks, and the time left of the training."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._reset()

    def _reset(self) -> None:
        self._started = time.monotonic()
        self._first_step = 0
        self._shown: dict[str, float] = {}

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset()
        self._first_step = trainer.global_step
        if self._enabled and trainer.is_global_zero and sys.stderr.isatty():
            columns = TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[line]}")
            bar = self._bar = Progress(*columns, expand=True)
            bar.start()
            bar.add_task("training", total=_total(pl_module), line="")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._bar is not None:
            self._shown["loss"] = float(trainer.callback_metrics.get("train/loss", float("nan")))
            description = f"epoch {trainer.current_epoch} step {trainer.global_step}"
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=trainer.global_step, description=description, line=self._line(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self._shown |= found
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero or not self._enabled:
            return
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in list(found.items())[:_MOST_METRICS])
        line = f"epoch {trainer.current_epoch}  step {trainer.global_step}  {metrics}  {self._line(trainer, bare=True)}"
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def _line(self, trainer: pl.Trainer, bare: bool = False) -> str:
        done = trainer.global_step - self._first_step
        left = max(0, _total(trainer.lightning_module) - trainer.global_step)
        seconds = (time.monotonic() - self._started) / max(done, 1) * left
        measured = throughput_of(trainer)
        speed = "" if measured is None or measured.speed is None else f"{measured.speed.line()}  "
        values = {} if bare else {k: v for k, v in self._shown.items() if k in ("loss", "val/acc")}
        return "  ".join([*(f"{k} {v:.3g}" for k, v in values.items()), f"{speed}ETA {_clock(seconds)}"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _total(module: Any) -> int:
    return module.total_steps


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
