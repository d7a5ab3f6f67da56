"""What `train.py`'s loop costs beside a bare PyTorch loop, and what share of a step waits for data.

    uv run python -m benchmarks.loop
    uv run python -m benchmarks.loop --given experiment=icons data.path=data/icons/icons.csv

Both loops train the same model on the same batches under the same optimizer, schedule and clipping: ours with the
callbacks and loggers of a run, the bare one with nothing but forward, backward, clip and step. They take turns, some
steps each, in a process of their own each, so that both find memory as they left it. There is no validation, which a
bare loop lacks. The share of waiting is by the wall clock, as a run logs it (`speed/waiting`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from torch import nn

from benchmarks.timing import Timings, now, parser, prepare, show
from mmformer.run.pretrained import adopt
from mmformer.training.quiet import silence

ROOT = Path(__file__).resolve().parents[1]


def configured(given: list[str], folder: str) -> tuple[Any, Any]:
    """The config of a run as `train.py` composes it, with the facts of its data, and the data."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", [f"paths.root={ROOT}", f"paths.run={folder}", "trainer.limit_val_batches=0", *given])
    adopt(config, [])
    data = instantiate(config.data.module, _convert_="all")
    data.setup()
    config.facts = data.facts() | {"monitor": "val/loss", "monitor_mode": "min"}
    return config, data


class Bare:
    """The loop that one would write by hand."""

    def __init__(self, module: Any, config: Any, data: Any, total_steps: int):
        self.model, self.objectives = module.model, dict(module.objectives.items())
        self.weights, self.clip = dict(config.module.weights), config.trainer.gradient_clip_val
        self.optimizer = module.make_optimizer(module.parts)
        self.schedule = module.make_schedule(self.optimizer, total_steps)
        self.device = next(module.parameters()).device
        self.batches = self._batches(data)

    def _batches(self, data: Any) -> Iterator[Any]:
        loader = data.train_dataloader()
        for epoch in count():
            loader.batch_sampler.set_epoch(epoch)
            yield from loader

    def run(self, steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            batch = next(self.batches).to(self.device)
            encoded = self.model.encode(batch)
            losses = [
                self.weights.get(name, 1.0) * part
                for name, objective in self.objectives.items()
                for part in objective(self.model, encoded, batch).values()
            ]
            loss = torch.stack(losses).sum()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.clip)
            self.optimizer.step()
            self.schedule.step()
        return loss.item()


class Turns(Callback):
    """Waits after every `steps` for its next turn, and tells how long the last one took."""

    def __init__(self, pipe: Connection, steps: int, device: torch.device):
        self.pipe, self.steps, self.device = pipe, steps, device
        self._since = now(device)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step % self.steps == 0:
            self.pipe.send(now(self.device) - self._since)
            self.pipe.recv()
            self._since = now(self.device)


class Waiting(Logger):
    """Keeps the share of waiting of every record."""

    name, version = "waiting", ""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "speed/waiting" in metrics:
            self.found.append(dict(metrics) | {"step": step or 0})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """There is nothing to keep of them."""


def ours(pipe: Connection, args: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config, data = configured(args.given, folder)
        config.trainer.max_steps = total(args)
        module = instantiate(config.module, _convert_="all")
        waiting, turns = Waiting(), Turns(pipe, args.steps, args.device)
        callbacks = [instantiate(c, _convert_="all") for c in config.callbacks.values() if c]
        loggers = [*(instantiate(logger, _convert_="all") for logger in config.logger.values() if logger), waiting]
        trainer = instantiate(config.trainer, logger=loggers, callbacks=[*callbacks, turns], _convert_="all")
        pipe.recv()
        trainer.fit(module, datamodule=data)
    pipe.send(waiting.found)


def bare(pipe: Connection, args: Any) -> None:
    config, data = configured(args.given, "runs/none")
    module = instantiate(config.module, _convert_="all")
    module.prepare()
    loop = Bare(module.to(args.device), config, data, total(args))
    while pipe.recv():
        start = now(args.device)
        loop.run(args.steps)
        pipe.send(now(args.device) - start)


def total(args: Any) -> int:
    return args.steps * (args.rounds + args.warm_up)


def measure(args: Any) -> Timings:
    context = get_context("fork")
    pipes = {}
    for name, work in (("bare PyTorch", bare), ("mmformer", ours)):
        pipes[name], other = context.Pipe()
        context.Process(target=work, args=(other, args)).start()
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for number in range(args.rounds + args.warm_up):
        for name in list(pipes) if number % 2 == 0 else reversed(pipes):
            pipes[name].send(True)
            seconds[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(False)
    found = [one for one in pipes["mmformer"].recv() if one["step"] > args.warm_up * args.steps]
    shown = {name: median(one[name] for one in found) for name in found[-1] if name.startswith("speed/")}
    print(", ".join(f"{name.removeprefix('speed/')} {value:.4g}" for name, value in shown.items()))
    rounds = {name: values[args.warm_up :] for name, values in seconds.items()}
    return Timings(" ".join(args.given) or "the embedded default", "bare PyTorch", rounds)


def main() -> None:
    options = parser(__doc__ or "", rounds=12)
    options.add_argument("--steps", type=int, default=10, help="of each loop in its turn")
    options.add_argument("--warm-up", type=int, default=6, help="turns that do not count")
    options.add_argument("--given", nargs="*", default=[], help="overrides of the config, as train.py takes them")
    args = prepare(options.parse_args())
    silence()
    show([measure(args)], args)


if __name__ == "__main__":
    main()
