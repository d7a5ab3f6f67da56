"""Looks at losses and gradients before every update, so that nothing that is not finite reaches the weights."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from mmformer.batch import Batch
from mmformer.datasets.sampler import counter_seed
from mmformer.training.checkpointing import load_whole
from mmformer.training.diagnosis import Diagnosis, diagnose, to_plain
from mmformer.training.module import NonFiniteLoss, Training


@runtime_checkable
class Policy(Protocol):
    """What to do about a step that is not to be taken as it is; whether the weights are left as they are."""

    def __call__(self, guard: Guard, trainer: pl.Trainer, module: Training, said: str) -> bool: ...


class Stop:
    """End the run before the update."""

    def __call__(self, guard: Guard, trainer: pl.Trainer, module: Training, said: str) -> bool:
        raise NonFiniteLoss(f"{said}; the weights were not updated")


class Warn:
    """Say so, and take the step."""

    def __call__(self, guard: Guard, trainer: pl.Trainer, module: Training, said: str) -> bool:
        guard.say(f"{said}; the step is taken")
        return False


class Skip:
    """Leave the step out; after `limit` in a row, end the run.

    The data go on with the next batch, and so do schedules.
    """

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit

    def __call__(self, guard: Guard, trainer: pl.Trainer, module: Training, said: str) -> bool:
        if guard.refused_in_a_row >= self.limit:
            raise NonFiniteLoss(
                f"{said}; {guard.refused_in_a_row} steps in a row were left out: lower the learning rate"
            )
        guard.say(f"{said}; the step is left out")
        return True


class Rollback:
    """Leave the step out and go back to the weights and moments of the last checkpoint; after `limit` times, end.

    The data go on: what led there is not repeated. Without a checkpoint yet, the step is left out.
    """

    def __init__(self, limit: int = 3) -> None:
        self.limit = limit

    def __call__(self, guard: Guard, trainer: pl.Trainer, module: Training, said: str) -> bool:
        if guard.rolled_back >= self.limit:
            raise NonFiniteLoss(f"{said}; rolled back {guard.rolled_back} times already: lower the learning rate")
        checkpoint = guard.checkpoint
        if not checkpoint.is_file():
            guard.say(f"{said}; the step is left out, there is no checkpoint to go back to yet")
            return True
        guard.rolled_back += 1
        state = load_whole(checkpoint)
        module.load_state_dict(state["state_dict"])
        for optimizer, saved in zip(trainer.optimizers, state["optimizer_states"], strict=True):
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        guard.say(f"{said}; back to the weights of step {state['global_step']}")
        return True


class Guard(Callback):
    """Stop, skip or roll back where a loss or a gradient is not finite (`nonfinite`) or the loss leaps (`spike`).

    A loss leaps above mean + `sigma` standard deviations of the last `window` ones; None looks for no leaps. What was
    found is written to `folder`: the rows, the objective, the inputs, the layer, and the batch with the weights, which
    `mmformer debug batch` computes again.
    """

    def __init__(
        self,
        folder: str,
        checkpoint: str,
        nonfinite: Policy,
        spike: Policy | None,
        *,
        sigma: float = 6.0,
        window: int = 100,
    ) -> None:
        super().__init__()
        self.folder, self.checkpoint = Path(folder), Path(checkpoint)
        self.nonfinite, self.spike, self.sigma, self.window = nonfinite, spike, sigma, window
        self.refused_in_a_row = self.rolled_back = 0
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)
        self._batches: list[tuple[int, Batch]] = []
        self._step = -1
        self._trainer: pl.Trainer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Training)
        self._trainer = trainer
        pl_module.guard = self

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        if self._step != trainer.global_step:  # the last step may not have been asked about: fp16's overflows are not
            self._step, self._batches = trainer.global_step, []
        self._batches.append((batch_idx, batch))

    def refuses(self, module: Training, loss: float, norm: float) -> bool:
        """Whether the step with this loss and norm of the gradients is left out; the same on every process."""
        batches, self._batches = self._batches, []
        trainer = self._trainer
        assert trainer is not None
        refused = False
        if not math.isfinite(loss) or not math.isfinite(norm):
            refused = self.nonfinite(self, trainer, module, self._nonfinite(module, batches, loss, norm))
        elif self.spike is not None and self._leaps(loss):
            mean = fmean(self._losses)
            said = f"the loss leaps at step {module.global_step}: {loss:.4g} after {mean:.4g} on average"
            refused = self.spike(self, trainer, module, f"{said}; rows {_some([i for _, b in batches for i in b.ids])}")
        if math.isfinite(loss) and not refused:
            self._losses.append(loss)
            self._norms.append(norm)
        self.refused_in_a_row = self.refused_in_a_row + 1 if refused else 0
        return refused

    def _leaps(self, loss: float) -> bool:
        if len(self._losses) < max(2, self.window // 2):
            return False
        return loss > fmean(self._losses) + self.sigma * pstdev(self._losses)

    def _nonfinite(self, module: Training, batches: list[tuple[int, Batch]], loss: float, norm: float) -> str:
        step = module.global_step
        lines: list[str] = []
        for batch_idx, batch in batches:
            found = self._diagnose(module, batch_idx, batch)
            if _is_bad(found) or len(batches) == 1:
                place = self.folder / f"step_{step:06}_{batch_idx:06}_{module.global_rank}.pt"
                self._write(place, module, batch_idx, batch, found)
                lines += [*found.lines(), f"compute it again: mmformer debug batch {os.path.relpath(place)}"]
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        return "\n  ".join([f"{what} at step {step}", *lines])

    def _diagnose(self, module: Training, batch_idx: int, batch: Batch) -> Diagnosis:
        seed = counter_seed(module.seed, "step", module.global_step, batch_idx, module.global_rank)
        assert self._trainer is not None
        with self._trainer.precision_plugin.forward_context():
            alone = self._trainer.world_size == 1
            return diagnose(module.parts, module.losses, batch, seed, gradients=alone)

    def _write(self, place: Path, module: Training, batch_idx: int, batch: Batch, found: Diagnosis) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        seed = counter_seed(module.seed, "step", module.global_step, batch_idx, module.global_rank)
        state = {name: value.detach().cpu() for name, value in module.parts.state_dict().items()}
        torch.save({"batch": to_plain(batch), "seed": seed, "weights": state}, place)
        history = {"losses": list(self._losses), "gradient_norms": list(self._norms)}
        report = {"step": module.global_step, **found.plain(), **history}
        place.with_suffix(".json").write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")

    def say(self, line: str) -> None:
        assert self._trainer is not None
        if self._trainer.is_global_zero:
            print(line, flush=True)

    def state_dict(self) -> dict[str, Any]:
        kept = {"losses": list(self._losses), "norms": list(self._norms)}
        return kept | {"rolled_back": self.rolled_back, "row": self.refused_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses.extend(state_dict["losses"])
        self._norms.extend(state_dict["norms"])
        self.rolled_back, self.refused_in_a_row = state_dict["rolled_back"], state_dict["row"]


def _is_bad(found: Diagnosis) -> bool:
    losses = [math.isfinite(loss) for loss in found.losses.values()]
    return bool(found.rows or found.inputs or found.weights or found.gradients or not all(losses))


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
