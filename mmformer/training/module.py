"""The training step, the evaluation step and nothing else: the one LightningModule that knows the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mmformer.batch import Batch
from mmformer.checkpoints import frozen
from mmformer.datasets.sampler import counter_seed
from mmformer.model import Encoded, Model
from mmformer.objectives import ranks
from mmformer.objectives.objective import Objective
from mmformer.training.adapters import merged
from mmformer.training.evaluation import Evaluation, Judged
from mmformer.training.finetune import Finetune, Schedule, rest
from mmformer.training.loggers import MetricsCSV
from mmformer.training.optim import Average, describe_groups, total_steps
from mmformer.training.weighting import Weight, Weighting

Found = TypeVar("Found")


class NonFiniteLoss(RuntimeError):
    """A loss or a gradient became NaN or infinite; raised before the step, so that the weights are still good."""


@runtime_checkable
class Watch(Protocol):
    """Looks at a step before it is taken (`mmformer.training.guard.Guard`)."""

    def refuses(self, module: Training, loss: float, norm: float) -> bool: ...


class Training(pl.LightningModule):
    """Train a model on weighted objectives, and judge it on every subset of its modalities.

    `weights[name]` scales an objective (1 where it is not named): a number, a function of the step, or one that is
    learned (`weighting`). `optimizer` makes one from a module, `schedule` a
    learning-rate schedule from the optimizer and the number of steps. `ema` is the decay of an average of the weights,
    which is then what is evaluated and exported. `finetune` says which parameters train, and from which step on. What
    trains and all randomness of a step are functions of (`seed`, step), so nothing of them is saved in a checkpoint.
    """

    def __init__(
        self,
        model: Model,
        objectives: Mapping[str, Objective],
        weights: Mapping[str, Weight],
        optimizer: Callable[[nn.Module], Optimizer],
        schedule: Callable[[Optimizer, int], LRScheduler],
        seed: int,
        ema: float | None,
        finetune: Finetune | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleDict(objectives)
        self.weighting = Weighting(weights, objectives)
        self.make_optimizer = optimizer
        self.make_schedule = schedule
        self.seed = seed
        self.ema = ema
        self.finetune = finetune
        self.average: Average | None = None
        """The average of the weights, from `prepare` on."""
        self.schedule = Schedule()
        self._stage: int | None = None
        """How many groups of the schedule train by now; None before `prepare`."""
        self._frozen: dict[str, Any] | None = None
        """What of each checkpoint never changes, once the first was saved."""
        self.size = (0, 0, 0)
        """Samples, tokens, and tokens with padding of the last training batch."""
        self.by_subset = True
        """Whether an evaluation outside of training judges each subset of the modalities too."""
        self.measured: dict[str, float] = {}
        """The metrics of the last evaluation."""
        self.on_judged: Callable[[str, str, dict[str, Tensor], Batch], None] | None = None
        """Is told what is predicted while a split is judged: objective, subset, predictions, samples."""
        self.guard: Watch | None = None
        """Asked before every update, with the loss and the norm of the gradients, whether it is left out."""
        self._refused = False
        self._norm: float | None = None
        self._evaluation: Evaluation | None = None
        self._step_losses: list[dict[str, Tensor]] = []

    # ------------------------------------------------------------------ what trains

    def prepare(self) -> None:
        """Freeze, adapt and start the average, once: to be called when the weights are loaded; else, a fit does it.

        Raises:
            ValueError: a pattern that matches nothing, or nothing that trains at the first step.
        """
        if self._stage is not None:
            return
        if self.finetune is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(counter_seed(self.seed, "adapters"))
                self.schedule = self.finetune.apply(self.model)
        self.schedule.set(self.model, self.schedule.last)
        for objective in self.objectives.values():
            assert isinstance(objective, Objective)
            objective.prepare(self.model)
        if self.ema is not None:
            self.average = Average(self.parts, self.ema)
        self._set_stage(0)
        if not any(p.requires_grad for p in self.parts.parameters()):
            raise ValueError(
                "everything is frozen at the first step: say what trains, as in module.finetune.train=[heads.*]"
            )

    def _set_stage(self, stage: int) -> None:
        self.schedule.set(self.model, stage)
        self._stage = stage
        self.train(self.training)

    def train(self, mode: bool = True) -> Training:
        """As of any module, but what is frozen stays in evaluation mode."""
        super().train(mode)
        rest(self.model)
        return self

    def setup(self, stage: str) -> None:
        self.prepare()
        strategy = self.trainer.strategy
        if stage == "fit" and self.schedule.later and not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
            raise ValueError(
                f"module.finetune.unfreeze with {type(strategy).__name__}, which fixes what trains when it starts:"
                " use one device or trainer=ddp"
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        stage = self.schedule.stage(self.global_step)
        if stage == self._stage:
            return
        self._set_stage(stage)
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):  # it gathers gradients only of what trained when it was wrapped
            strategy.model = self
            strategy.configure_ddp()

    @property
    def parts(self) -> nn.ModuleDict:
        """What trains: the model, the objectives and the learned weights of these."""
        learned = {"weighting": self.weighting} if self.weighting.learned else {}
        return nn.ModuleDict({"model": self.model, "objectives": self.objectives, **learned})

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted losses of a batch by name."""
        objectives: dict[str, Objective] = dict(self.objectives.items())  # pyright: ignore
        needed = any(objective.needs_encoded for objective in objectives.values())
        encoded = self.model.encode(batch) if needed else Encoded({}, len(batch))
        self.size = _size(batch, encoded)
        return self._losses(self.model, objectives, encoded, batch)

    def evaluated(self) -> tuple[Model, dict[str, Objective]]:
        """The model and the objectives that are judged and exported: their average where there is one."""
        parts = self.parts if self.average is None else self.average.module
        return parts["model"], dict(parts["objectives"].items())  # pyright: ignore

    def exported(self) -> tuple[Model, dict[str, Objective]]:
        """What is evaluated, as it is saved for use: adapters are merged into the weights, and need no library."""
        model, objectives = self.evaluated()
        return merged(model), {name: objective.exported() for name, objective in objectives.items()}

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        seed_device(counter_seed(self.seed, "step", self.global_step, batch_idx, self.global_rank), self.device)
        if not len(batch) and not ranks.active():
            return self._idle()
        losses = self.losses(batch)
        total = torch.stack([*losses.values(), torch.zeros((), device=self.device)]).sum()
        if ranks.active() and isinstance(self.trainer.strategy, DDPStrategy):
            total = _Reach.apply(total, *(p for p in self.parameters() if p.requires_grad))
        if not losses or not total.requires_grad:
            return self._idle()
        if self.guard is None and not torch.isfinite(total):
            self._refuse(losses, batch)
        self.log("train/loss", total.detach(), logger=False, batch_size=1)
        self._step_losses.append({"loss": total.detach()} | {f"loss_{k}": v.detach() for k, v in losses.items()})
        return total

    def _losses(
        self, model: Model, objectives: Mapping[str, Objective], encoded: Encoded, batch: Batch
    ) -> dict[str, Tensor]:
        """Weighted losses: an objective's name, with that of its loss where it has several."""
        out = {}
        for name, objective in objectives.items():
            found = self.weighting(name, objective(model, encoded, batch), self.global_step)
            out |= {name if part == "loss" else f"{name}_{part}": loss for part, loss in found.items()}
        return out

    def _idle(self) -> Tensor:
        """A loss of 0 that reaches every parameter: a process without a sample still takes part in the step."""
        return torch.stack([p.flatten()[0] * 0.0 for p in self.parameters() if p.requires_grad]).sum()

    def _refuse(self, losses: Mapping[str, Tensor], batch: Batch) -> None:
        bad = {name: loss.item() for name, loss in losses.items() if not torch.isfinite(loss)}
        shown = ", ".join(batch.ids[:8]) + (f" and {len(batch) - 8} more" if len(batch) > 8 else "")
        raise NonFiniteLoss(
            f"the loss is not finite at step {self.global_step}: {bad or dict.fromkeys(losses, 'sum')};"
            f" the rows of this batch: {shown}; the weights were not updated:"
            " look at these rows, or lower the learning rate (module.optimizer.lr)"
        )

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip, and let the guard see the loss and the norm, which are then computed once.

        Also under bf16, where Lightning refuses a fused optimizer for the loss scaling that only fp16 has.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        kind, value = GradClipAlgorithmType(gradient_clip_algorithm or "norm"), gradient_clip_val or 0.0
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self._sharded:
            norm = self.trainer.strategy.reduce(norm.square(), reduce_op="sum").sqrt()  # pyright: ignore
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif value > 0 and kind == GradClipAlgorithmType.VALUE:
            nn.utils.clip_grad_value_(parameters, value)
        elif value > 0:
            nn.utils.clip_grads_with_norm_(parameters, value, norm)
        self._watch(optimizer, norm)

    @property
    def _sharded(self) -> bool:
        return not isinstance(self.trainer.strategy, DDPStrategy | SingleDeviceStrategy)

    def _watch(self, optimizer: Any, norm: Tensor) -> None:
        """Ask the guard; what it refuses loses its gradients, and an optimizer without gradients does nothing."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if self.guard is None or (scaled and not norm.isfinite()):  # in fp16 overflow is usual, and the scaler's matter
            return
        losses = [part["loss"].to(norm) for part in self._step_losses]
        seen = torch.stack([torch.stack(losses).mean() if losses else norm.new_zeros(()), norm])
        if self.trainer.world_size > 1:
            seen = self.trainer.strategy.reduce(seen, reduce_op="mean")  # all see the same, and decide alike
        loss, self._norm = seen.tolist()
        assert self._norm is not None
        self._refused = self.guard.refuses(self, loss, self._norm)
        if self._refused:
            optimizer.zero_grad(set_to_none=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        step = self.global_step + 1  # Lightning counts after this hook
        if not self._refused:
            for objective in self.objectives.values():
                assert isinstance(objective, Objective)
                objective.advance(self.model)
            if self.average is not None:
                self.average.update(self.parts, step)
        self._record_step(step)

    def _record_step(self, step: int) -> None:
        """Log now and not through Lightning, which would log after a checkpoint of this step was saved."""
        losses, self._step_losses = self._step_losses, []
        if step % self._log_every and step != 1:
            return
        mine = {name: [part[name].item() for part in losses if name in part] for part in losses for name in part}
        everyone = self._from_all_ranks(mine)
        names = dict.fromkeys(name for found in everyone for name in found)
        values = {name: [value for found in everyone for value in found.get(name, ())] for name in names}
        metrics = {f"train/{name}": sum(found) / len(found) for name, found in values.items()}
        if metrics and self._norm is not None:
            metrics["train/gradient_norm"] = self._norm
        if metrics:
            self.record(metrics | {"lr": float(self.trainer.optimizers[0].param_groups[0]["lr"])}, step)

    @property
    def _log_every(self) -> int:
        trainer: Any = self.trainer
        return max(1, trainer.log_every_n_steps)

    def record(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand metrics to every logger, under the number of optimizer steps that were made."""
        for logger in self.loggers:
            # by arithmetic: Lightning counts another epoch when training ends within one
            logger.log_metrics(dict(metrics) | {"epoch": max(0, step - 1) // self._steps_per_epoch}, step=step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["trackers"] = {
            "rows": {logger.path.name: logger.rows for logger in self._csv_files()},
            "wandb": [str(logger.version) for logger in self.loggers if type(logger).__name__ == "WandbLogger"],
        }
        if self.schedule.never and self.trainer.is_global_zero:
            self._frozen = self._frozen or self._describe_frozen(checkpoint["state_dict"])
            checkpoint[frozen.KEY] = self._frozen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rows = checkpoint["trackers"]["rows"]
        for logger in self._csv_files():
            # by name: a run may go on with other loggers than it had, and one that is new has nothing to take back
            logger.rewind(rows.get(logger.path.name, 0))

    def _csv_files(self) -> list[MetricsCSV]:
        return [logger for logger in self.loggers if isinstance(logger, MetricsCSV)]

    def _describe_frozen(self, state: dict[str, Tensor]) -> dict[str, Any]:
        places = ["model.", *(["average.module.model."] if self.average is not None else [])]
        return frozen.describe(state, [f"{place}{name}" for place in places for name in self.schedule.never])

    def on_fit_start(self) -> None:
        self._frozen = None

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        self._start(by_subset=self.by_subset and self.trainer.state.fn != "fit")

    def on_test_epoch_start(self) -> None:
        self._start(by_subset=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _start(self, by_subset: bool) -> None:
        model, objectives = self.evaluated()
        self._evaluation = Evaluation(objectives, list(model.encoders), by_subset)
        self._loss_sum, self._loss_count = 0.0, 0

    def _evaluate(self, batch: Batch, split: str) -> None:
        assert self._evaluation is not None
        model, objectives = self.evaluated()
        judged: list[Judged] = []
        total, count = 0.0, 0
        if len(batch):
            encoded = model.encode(batch)
            losses = self._losses(model, objectives, encoded, batch)
            if losses:
                total, count = float(torch.stack(list(losses.values())).sum()) * len(batch), len(batch)
            judged = list(self._evaluation.judge(objectives, model, encoded, batch))
        if self.trainer.world_size > 1:
            judged = [(n, s, {k: v.cpu() for k, v in p.items()}, b.to("cpu")) for n, s, p, b in judged]
        for part, part_total, part_count in self._from_all_ranks((judged, total, count)):
            self._evaluation.update(part)
            if self.on_judged is not None:
                for item in part:
                    self.on_judged(*item)
            self._loss_sum += part_total
            self._loss_count += part_count

    def _from_all_ranks(self, found: Found) -> list[Found]:
        """What every process found in its share, in their order; all of them must ask."""
        if self.trainer.world_size == 1:
            return [found]
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, found)
        return gathered

    def _finish(self, split: str) -> None:
        assert self._evaluation is not None
        metrics = {"loss": self._loss_sum / self._loss_count} if self._loss_count else {}
        metrics |= self._evaluation.compute()
        self._evaluation = None
        named = self.measured = {f"{split}/{name}": value for name, value in metrics.items()}
        self.log_dict(named, logger=False, batch_size=1)
        if self.trainer.state.fn == "test" or (self.trainer.state.fn == "fit" and not self.trainer.sanity_checking):
            self.record(named, self.global_step)

    # ------------------------------------------------------------------ optimizer

    def configure_optimizers(self) -> Any:
        # What trains later has its place from the start, but neither gradient, moments nor a step before its time: so
        # any schedule of rates goes on for it, and the groups of a resumed run are those of the checkpoint.
        now = self._stage or 0
        self.schedule.set(self.model, self.schedule.last)
        optimizer = self.make_optimizer(self.parts)
        self.schedule.set(self.model, now)
        schedule = self.make_schedule(optimizer, self.total_steps)
        if len({group["lr"] for group in optimizer.param_groups}) > 1 or self.schedule != Schedule():
            _say(f"optimizer:\n{describe_groups(optimizer, self.parts)}")
            for step, names in self.schedule.later:
                _say(f"   from step {step}: {len(names)} tensors, such as {min(names)}")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        trainer = self.trainer
        return total_steps(trainer.max_steps, trainer.max_epochs, self._steps_per_epoch)

    @cached_property
    def _steps_per_epoch(self) -> int:
        # Not trainer.estimated_stepping_batches: it starts the loader before a checkpoint has set its place.
        trainer: Any = self.trainer
        batches: int = trainer.datamodule.batches_per_epoch()
        for limit in (trainer.limit_train_batches, trainer.overfit_batches or 1.0):
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return max(1, math.ceil(batches / trainer.accumulate_grad_batches))


class _Reach(torch.autograd.Function):
    """A loss that reaches parameters without a gradient for them.

    DDP waits for every parameter on every process, also for those that the share of one process has no use for.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, *([None] * ctx.count)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of one device; torch.manual_seed writes down the call stack for all others."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@rank_zero_only
def _say(lines: str) -> None:
    print(lines, flush=True)


def _size(batch: Batch, encoded: Encoded) -> tuple[int, int, int]:
    tokens = sum(t.layout.total if t.layout is not None else int(t.valid.sum()) for t in encoded.values())
    return len(batch), tokens, sum(t.segment.numel() for t in encoded.values())
