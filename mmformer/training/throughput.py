"""How fast a run trains, how long it waits for data, and what share of the machine's arithmetic it uses."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, astuple, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.profilers import Profiler

from mmformer.batch import Batch
from mmformer.training.loggers import CLOCKED
from mmformer.training.operations import Operations, matmul_rate, product_dtype

# The first batch sets up and compiles, the operations of those behind it are counted; none of these is timed.
_COUNTED = range(1, 4)
_FETCH = ".train_dataloader_next"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What is logged: of all processes together, but `memory_gb` and what is a share, which are those of one.

    `padding` is the share of tokens that are none, `waiting` that of the time in which the next batch was not there
    yet. `memory_gb` is the highest so far, of the GPU or, without one, of the process. `mfu` is the rate of the
    operations of a step on real tokens, divided by that of a plain product of the run's precision on this device.
    """

    samples_per_second: float
    tokens_per_second: float
    padding: float
    waiting: float
    memory_gb: float | None = None
    mfu: float | None = None

    def metrics(self) -> dict[str, float]:
        return {f"{CLOCKED}{name}": value for name, value in asdict(self).items() if value is not None}

    def line(self) -> str:
        """For the line that a run shows."""
        parts = [f"{self.samples_per_second:,.0f} samples/s", f"{self.tokens_per_second:,.0f} tokens/s"]
        parts += [f"padding {self.padding:.0%}", f"waiting {self.waiting:.1%}"]
        parts += [] if self.memory_gb is None else [f"{self.memory_gb:.1f} GB"]
        return "  ".join(parts + ([] if self.mfu is None else [f"MFU {self.mfu:.0%}"]))


@dataclass
class _Sums:
    """Of the batches since the last record."""

    seconds: float = 0.0
    waited: float = 0.0
    samples: float = 0.0
    tokens: float = 0.0
    slots: float = 0.0

    def add(self, seconds: float, waited: float, size: tuple[int, int, int]) -> None:
        samples, tokens, slots = size
        self.seconds, self.waited = self.seconds + seconds, self.waited + waited
        self.samples, self.tokens, self.slots = self.samples + samples, self.tokens + tokens, self.slots + slots


class Throughput(Callback):
    """Measure and log samples and tokens a second, padding, waiting for data, peak memory and MFU.

    The time of a step runs from asking for its batch to the end of its update: what checkpoints, validation and other
    callbacks take behind it is not in it. The operations of the second to fourth batch are counted as they run
    (`Operations`), and taken to grow with the real tokens. Figures go to every logger every `log_every_n_steps`, but
    for `metrics.csv`, which is the same for a run that was killed and went on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.speed: Speed | None = None
        """Of the last steps that were recorded."""
        self._fetching: _Fetching | None = None
        self._reset(0)

    def _reset(self, step: int) -> None:
        self._sums, self._batches, self._recorded = _Sums(), 0, step
        self._counter: Operations | None = None
        self._operations = self._counted_tokens = 0.0
        self._rate = float("nan")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset(trainer.global_step)
        self.speed = None
        device = trainer.strategy.root_device
        self._rate = matmul_rate(device, product_dtype(trainer.precision))
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        profiler: Any = trainer.profiler  # pyright: ignore[reportAttributeAccessIssue]
        self._fetching = _Fetching(profiler)
        trainer.profiler = self._fetching  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        if self._batches in _COUNTED:
            self._counter = Operations()
            self._counter.__enter__()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count(pl_module)

    def _count(self, module: Any) -> None:
        """End the counting of a batch, where it runs."""
        if self._counter is None:
            return
        counter, self._counter = self._counter, None
        counter.__exit__(None, None, None)
        _, tokens, slots = module.size
        if tokens:  # what is spent on padding is no use, and all but attention is spent alike on every slot
            self._operations += counter.total * tokens / slots
            self._counted_tokens += tokens

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._count(pl_module)  # a batch without a loss has no backward pass
        fetching = self._fetching
        assert fetching is not None
        if self._batches > _COUNTED[-1]:
            size = pl_module.size if len(batch) else (0, 0, 0)
            self._sums.add(time.perf_counter() - fetching.asked, fetching.waited, size)
        self._batches += 1
        step = trainer.global_step
        every = max(1, trainer.log_every_n_steps)  # pyright: ignore[reportAttributeAccessIssue]
        if step % every == 0 and step != self._recorded and self._sums.seconds:
            self.speed = self._measure(trainer)
            pl_module.record(self.speed.metrics(), step)
            self._sums, self._recorded = _Sums(), step

    def _measure(self, trainer: pl.Trainer) -> Speed:
        sums, device = self._sums, trainer.strategy.root_device
        if trainer.world_size > 1:
            values: Any = trainer.strategy.reduce(torch.tensor(astuple(sums), device=device), reduce_op="mean")
            sums = _Sums(*values.tolist())
        seconds = max(sums.seconds, 1e-9)
        operations = sums.tokens * self._operations / self._counted_tokens if self._counted_tokens else 0.0
        return Speed(
            samples_per_second=trainer.world_size * sums.samples / seconds,
            tokens_per_second=trainer.world_size * sums.tokens / seconds,
            padding=1 - sums.tokens / sums.slots if sums.slots else 0.0,
            waiting=sums.waited / seconds,
            memory_gb=peak_memory(device),
            mfu=operations / seconds / self._rate if operations else None,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    def _leave(self, trainer: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None
        if self._fetching is not None:
            trainer.profiler, self._fetching = self._fetching.inner, None


class _Fetching(Profiler):
    """Times how long the loop waits for a batch, and hands everything on to the profiler that was there."""

    def __init__(self, inner: Profiler) -> None:
        super().__init__()
        self.inner = inner
        self.asked = time.perf_counter()
        """When the last batch was asked for."""
        self.waited = 0.0
        """Seconds until it was there."""

    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        if action_name.endswith(_FETCH):
            self.asked = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(_FETCH):
            self.waited = time.perf_counter() - self.asked
        self.inner.stop(action_name)


def peak_memory(device: torch.device) -> float | None:
    """The highest memory so far in GB (10^9 bytes): of a CUDA device, else of this process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest * (1 if sys.platform == "darwin" else 1024) / 1e9


def throughput_of(trainer: Any) -> Throughput | None:
    """The callback of a trainer that measures its speed."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Throughput)), None)
