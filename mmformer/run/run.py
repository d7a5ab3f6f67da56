"""One training run around the Trainer: what is set up before it, and what is written after it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from lightning_fabric.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from pytorch_lightning.loggers import WandbLogger

from mmformer.checkpoints import save_model
from mmformer.datasets.blackbox import last_words
from mmformer.report.collect import Collector, report_test
from mmformer.run.compilation import compile_layers
from mmformer.run.config import changes, drop_absent, missing
from mmformer.run.folder import METRICS, Lock, write_json
from mmformer.run.grafts import Graft, graft
from mmformer.run.launch import UserError, command, named_keys
from mmformer.run.pretrained import Pretrained, adopt
from mmformer.run.summary import final_table, parameters_line
from mmformer.run.teachers import open_teachers
from mmformer.run.tracking import log_results
from mmformer.training.checkpointing import clean, load_whole, newest_whole
from mmformer.training.checkpoints import Checkpoints, other_versions
from mmformer.training.interruption import Interrupted
from mmformer.training.memory import keep_freed_memory, ran_out
from mmformer.training.module import Training
from mmformer.training.precision import check_precision, fast_matmul
from mmformer.training.quiet import silence


class Run:
    """The run folder is held while this is entered; an interruption leaves it with the command that goes on.

    `config` is the composed DictConfig, which takes in the facts of the data. No part of the package sees it.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.folder = Path(config.paths.run)
        self.checkpoint: Path | None = None
        self._plain: dict[str, Any] = {}
        self._pretrained: list[Pretrained] = []
        self._lock: Lock | None = None
        self._started = datetime.now()
        self._clock = time.monotonic()

    def __enter__(self) -> Run:
        config = self.config
        for key in missing(config):
            raise UserError(f"{key} has no value: give it, as in {key}=...")
        if config.extras.quiet:
            silence()
        _refuse_sweep_of_processes(config)
        if _is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.folder)
            clean(self.folder / "checkpoints")
        if config.extras.keep_memory:
            keep_freed_memory()
        if config.extras.threads:
            torch.set_num_threads(config.extras.threads)
        pl.seed_everything(config.seed, workers=True, verbose=False)
        self.checkpoint = self._start()
        if self.checkpoint is None:
            (self.folder / "metrics.csv").unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Interrupted) and _is_first():
            print(f"{error}: saved; go on with\n  {self._resume_command()}")
        if self._lock is not None:
            self._lock.release()
        if "wandb" in sys.modules:  # a sweep goes on in this process
            sys.modules["wandb"].finish()
        if isinstance(error, Exception) and (said := last_words(error) or ran_out(error)):
            raise UserError(said) from error

    def _resume_command(self) -> str:
        return command(f"resume={_short(self.folder)}")

    def _start(self) -> Path | None:
        """The checkpoint to go on from, compared with the config of now."""
        config = self.config
        if config.ckpt_path:
            found = Path(config.ckpt_path)
            if not found.is_file():
                raise UserError(f"ckpt_path={found}: no such file; resume=auto finds the newest unfinished run")
        elif config.resume:
            found = newest_whole(self.folder / "checkpoints")
            _say(f"resume: {found} " if found else f"resume: {_short(self.folder)} has no checkpoint: from the start")
        else:
            return None
        return found

    def _compare(self, plain: dict[str, Any]) -> None:
        """Say what differs from the config of the checkpoint; refuse what would make it another run."""
        if self.checkpoint is None:
            return
        state = load_whole(self.checkpoint)
        for line in other_versions(state):
            _say(
                f"warning: changed since {self.checkpoint.name}: {line}: the run may go on otherwise than it would have"
            )
        allowed, refused = changes(state.get("hyper_parameters", {}), plain)
        for line in [*allowed, *refused]:
            _say(f"changed since {self.checkpoint.name}: {line}")
        if refused and self.config.fit and not self.config.allow_changes:
            raise UserError(
                f"{len(refused)} of these changes ({refused[0]}) would make this neither the old run nor a new one:"
                " leave them out, start anew without resume, or set allow_changes=true"
            )
        if (ids := state.get("trackers", {}).get("wandb")) and self.config.logger.get("wandb"):
            self.config.logger.wandb.id = ids[0]

    def data(self) -> Any:
        """The data, set up, and what they and checkpoints tell the model written into the config."""
        config = self.config
        self._pretrained = adopt(config, named_keys())
        with _in_one_line():
            data = instantiate(config.data.module, _convert_="all")
            data.setup()
        facts = data.facts()
        config.facts = facts
        for name in drop_absent(config, facts["modalities"]):
            _say(f"the data have no {name}: its encoder is left out")
        metric, mode = _headline(config.module.objectives)
        config.facts = facts | {"monitor": f"val/{metric}", "monitor_mode": mode}
        for line in data.summary():
            _say(line)
        return data

    def module(self, data: Any) -> Training:
        """The model with its objectives, with weights from elsewhere where they are asked for."""
        config = self.config
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # pyright: ignore
        self._compare(plain)
        if _is_first() and not config.trainer.fast_dev_run:
            _write_yaml(self.folder / "config.yaml", plain)
        if config.extras.print_config:
            _say(OmegaConf.to_yaml(OmegaConf.create(plain)))
        module: Training = instantiate(config.module, _convert_="all")
        module.hparams.update(plain)
        self._plain = plain
        for checkpoint in self._pretrained:
            for line in checkpoint.load(module.model, dict(module.objectives.items())):
                _say(line)
        for line in graft(module.model, [Graft(**one) for one in plain["grafts"]]):
            _say(line)
        with _in_one_line():
            for line in open_teachers(module.objectives.values(), plain, data.tokenizer):
                _say(line)
            module.prepare()
        if config.extras.compile:
            compile_layers(module.model)
        _say(parameters_line(module.model))
        return module

    def trainer(self) -> pl.Trainer:
        config = self.config
        loggers = [instantiate(logger, _convert_="all") for logger in (config.logger or {}).values() if logger]
        callbacks = [instantiate(c, _convert_="all") for c in (config.callbacks or {}).values() if c]
        with _in_one_line():
            check_precision(config.trainer.precision, config.trainer.accelerator)
        trainer: pl.Trainer = instantiate(config.trainer, logger=loggers, callbacks=callbacks, _convert_="all")
        if config.extras.fast_matmul:
            fast_matmul(trainer.strategy.root_device)
        for logger in loggers:
            if isinstance(logger, WandbLogger) and self._plain:
                logger.log_hyperparams(self._plain)
        _say(f"folder: {_short(self.folder)}")
        return trainer

    def finish(self, trainer: pl.Trainer, module: Training, data: Any) -> float | None:
        """Judge the best weights, write the run folder, and say what to do next."""
        if self.config.trainer.fast_dev_run:
            return None
        self._load_best(trainer, module, data)
        collector = Collector(module.evaluated()[1])
        metrics: dict[str, float] = {}
        if self._validates(data):
            trainer.validate(module, datamodule=data, verbose=False)
            metrics |= module.measured
        if self.config.test and data.has("test"):
            module.on_judged = collector.update
            trainer.test(module, datamodule=data, verbose=False)
            metrics |= module.measured
        if trainer.is_global_zero:
            self._write(trainer, module, data, metrics, collector)
            final_table(metrics, list(module.model.encoders), self.folder, self._next_commands())
        return self._optimized(metrics)

    def _validates(self, data: Any) -> bool:
        """Whether there is a best step; without validation it is the last."""
        return data.has("val") and self.config.trainer.limit_val_batches != 0

    def _load_best(self, trainer: pl.Trainer, module: Training, data: Any) -> None:
        source = self.checkpoint
        if self.config.fit:
            keepers = [callback for callback in _callbacks(trainer) if isinstance(callback, Checkpoints)]
            for keeper in keepers if self._validates(data) else []:
                keeper.finish(trainer, module, data)
            best = [Path(keeper.best_model_path) for keeper in keepers if keeper.best_model_path]
            source = best[0] if best else None
        if source is not None:
            module.load_state_dict(load_whole(source)["state_dict"])

    def _write(
        self, trainer: pl.Trainer, module: Training, data: Any, metrics: dict[str, float], collector: Collector
    ) -> None:
        model, objectives = module.exported()
        save_model(self.folder / "model", model, dict(module.hparams), data.tokenizer, objectives)
        write_json(self.folder / METRICS, {name: metrics[name] for name in sorted(metrics)})
        names = module.hparams["facts"]["targets"].get(collector.target, {}).get("names", [])
        facts = {
            "seconds": round(time.monotonic() - self._clock, 1),
            "parameters": sum(p.numel() for p in model.parameters()),
            "device": str(trainer.strategy.root_device),
            "resumed": self.checkpoint is not None,
        }
        decode = None if data.tokenizer is None else data.tokenizer.decode
        report_test(self.folder, collector, data.manifest, names, self._started, decode, **facts)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                log_results(logger, self.folder, data.manifest, metrics)

    def _next_commands(self) -> dict[str, str]:
        folder = _short(self.folder)
        return {
            "predict": f"mmformer predict {folder} --input rows.csv --output out.csv",
            "go on": command(f"resume={folder}", f"trainer.max_steps={2 * max(1, self.config.trainer.max_steps)}"),
            "dashboard": f"tensorboard --logdir {_short(self.folder.parent)}",
        }

    def _optimized(self, metrics: dict[str, float]) -> float | None:
        name = self.config.optimized_metric
        if name is None:
            return None
        if name not in metrics:
            raise UserError(f"optimized_metric={name} is not measured; there are: {', '.join(sorted(metrics))}")
        return metrics[name]


def _is_first() -> bool:
    """Whether this process speaks and writes for all of them."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def _in_one_line() -> Iterator[None]:
    """What a part has to complain of while it is set up is for the user to mend, and needs no traceback."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error


def _headline(objectives: Any) -> tuple[str, str]:
    """The metric to choose a checkpoint by, and whether it should become min or max: that of the first objective.

    It is the first objective whose metrics have the plain names.
    """
    found = [getattr(_objective(name, part), "headline", None) for name, part in objectives.items()]
    return next(filter(None, found), ("loss", "min"))


def _objective(name: str, part: Any) -> Any:
    """The class of an objective."""
    target = part["_target_"]
    if target.endswith(".None"):  # ${facts.objective}
        raise UserError(
            f"module.objectives.{name} predicts the label, and the data have none: name its column"
            " (data.columns.label=...), or choose another objective (objective@module.objectives=[contrastive])"
        )
    try:
        return get_object(target)
    except ImportError as error:
        raise UserError(f"module.objectives.{name}: {' '.join(str(error).split())}") from error


def _callbacks(trainer: pl.Trainer) -> list[Any]:
    return list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]


def _refuse_sweep_of_processes(config: Any) -> None:
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN and config.trainer.devices != 1:
        raise UserError(
            f"-m with trainer.devices={config.trainer.devices}: each process would start the whole sweep again;"
            " sweep with one device, or start the runs one by one"
        )


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)


def _short(path: Path) -> str:
    """A path as one would type it here."""
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)


def _write_yaml(path: Path, plain: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    OmegaConf.save(OmegaConf.create(json.loads(json.dumps(plain))), temporary)
    temporary.replace(path)
