"""What a run shows while it trains: one line that moves in a terminal, one line an epoch in a file."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TextColumn

_SMOOTHING = 0.95
_MOST_METRICS = 8  # the first are the important ones; the others stand in metrics.csv


class ProgressLine(ProgressBar):
    """Step, loss, samples and tokens a second, share of padding, and the time left of the whole training."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._reset()

    def _reset(self) -> None:
        self._seconds = self._samples = self._tokens = self._slots = 0.0
        self._started = self._before = time.monotonic()
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
        now = time.monotonic()
        samples, tokens, slots = pl_module.size
        keep = _SMOOTHING if self._seconds else 0.0
        for name, value in (
            ("_seconds", now - self._before),
            ("_samples", samples),
            ("_tokens", tokens),
            ("_slots", slots),
        ):
            setattr(self, name, keep * getattr(self, name) + (1 - keep) * value)
        self._before = now
        if self._bar is not None:
            self._shown["loss"] = float(trainer.callback_metrics.get("train/loss", float("nan")))
            description = f"epoch {trainer.current_epoch} step {trainer.global_step}"
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=trainer.global_step, description=description, line=self._line(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self._shown |= found
        self._before = time.monotonic()
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero or not self._enabled:
            return
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in list(found.items())[:_MOST_METRICS])
        line = f"epoch {trainer.current_epoch}  step {trainer.global_step}  {metrics}  {self._line(trainer, bare=True)}"
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def _line(self, trainer: pl.Trainer, bare: bool = False) -> str:
        seconds = max(self._seconds, 1e-9)
        padding = 1 - self._tokens / self._slots if self._slots else 0.0
        done = trainer.global_step - self._first_step
        left = (
            (time.monotonic() - self._started)
            / max(done, 1)
            * max(0, _total(trainer.lightning_module) - trainer.global_step)
        )
        shown = (
            "" if bare else "  ".join(f"{k} {v:.3g}" for k, v in self._shown.items() if k in ("loss", "val/acc")) + "  "
        )
        return (
            f"{shown}{self._samples / seconds:,.0f} samples/s  {self._tokens / seconds:,.0f} tokens/s"
            f"  padding {padding:.0%}  ETA {_clock(left)}"
        )

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
