"""SIGKILL a run at random moments, go on, and compare with the run that was never stopped, bit for bit.

    python -m tests.campaign.kill_resume --kills 30

One parent imports everything, each trial is a fork of it: a trial costs a second, not the import.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback

from mmformer.model import Model
from mmformer.objectives.objective import Objective
from mmformer.training.adapters import Lora
from mmformer.training.checkpointing import newest_whole
from mmformer.training.finetune import Finetune
from mmformer.training.module import Training
from tests.campaign.trials import Outcome, attempt, folder, part
from tests.training.toy import Toy, result, toy_model, toy_trainer, toy_training


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set-up of a run; `workers_after` are those of the run that goes on, `make` its module with an average."""

    workers: int = 0
    workers_after: int = 0
    accumulate: int = 1
    ema: float | None = None
    steps: int = 14
    every_n_steps: int = 3
    batch_tokens: int | None = None
    val_check_interval: float = 1.0
    make: Callable[[float | None], Training] = toy_training


CASES = (
    Case(),
    Case(workers=2, workers_after=2),
    Case(workers=0, workers_after=2, ema=0.9),
    Case(workers=2, workers_after=0, accumulate=2, steps=8),
    Case(accumulate=2, ema=0.9, steps=9, every_n_steps=1),
    Case(batch_tokens=40, every_n_steps=1, val_check_interval=0.5),
)


def train(folder: Path, case: Case, workers: int, callbacks: Sequence[Any] = ()) -> None:
    """Train from the newest whole checkpoint of a folder to the end, and write down everything of the result."""
    torch.set_num_threads(1)
    checkpoint = newest_whole(folder / "checkpoints")
    if checkpoint is None:
        (folder / "metrics.csv").unlink(missing_ok=True)
    data = Toy(workers, batch_tokens=case.batch_tokens)
    data.setup()
    module = case.make(case.ema)
    options: dict[str, Any] = {"every_n_steps": case.every_n_steps, "val_check_interval": case.val_check_interval}
    trainer = toy_trainer(folder, case.steps, case.accumulate, callbacks=list(callbacks), **options)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    trainer.callbacks[-1].finish(trainer, module, data)  # pyright: ignore[reportAttributeAccessIssue]
    found = json.dumps(result(folder, module, trainer))
    (folder / "result.part").write_text(found)
    os.replace(folder / "result.part", folder / "result.json")


def forked(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run something in a fork; the wait status. With `kill_after` seconds, SIGKILL it then."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        end = time.monotonic() + kill_after
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return status
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def straight(folder: Path, case: Case) -> tuple[dict[str, Any], float]:
    """The run that is never stopped, and how long it takes."""
    start = time.monotonic()
    if status := forked(lambda: train(folder, case, case.workers)):
        raise RuntimeError(f"the run itself failed with status {status}: {case}")
    return json.loads((folder / "result.json").read_text()), time.monotonic() - start


def trial(folder: Path, case: Case, kills: list[float]) -> tuple[dict[str, Any], int]:
    """Kill a run after each of these times, go on each time, then to the end; the result, and how many kills hit it."""
    hits = 0
    workers = case.workers
    for after in kills:
        status = forked(lambda w=workers: train(folder, case, w), after)
        hits += os.WIFSIGNALED(status)
        workers = case.workers_after
    if not (folder / "result.json").is_file() and (status := forked(lambda: train(folder, case, workers))):
        raise RuntimeError(f"going on failed with status {status}: {case}, killed after {kills}")
    return json.loads((folder / "result.json").read_text()), hits


class KillAt:
    """Kills the process itself in one of the hooks of a step; `callback()` is what a trainer takes."""

    def __init__(self, hook: str, step: int) -> None:
        self.hook, self.step = hook, step

    def callback(self) -> Any:
        def kill(this: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == self.step:
                os.kill(os.getpid(), signal.SIGKILL)

        return type("Kill", (Callback,), {self.hook: kill})()


def adapted(ema: float | None) -> Training:
    """The toy with LoRA, its other weights frozen and written once."""
    lora = Lora(rank=4, alpha=8, dropout=0.1, targets=("*.layers.*",))
    return toy_training(ema, finetune=Finetune(freeze=["*"], train=["heads.*"], unfreeze=[], adapters=lora))


def thawing(ema: float | None) -> Training:
    """The toy whose encoder of pictures trains from the fourth step on."""
    unfreeze = [{"step": 4, "patterns": ["encoders.image.*"]}]
    return toy_training(ema, finetune=Finetune(freeze=["encoders.image.*"], train=[], unfreeze=unfreeze, adapters=None))


def taught(ema: float | None) -> Training:
    """The toy with a teacher of other weights, whose answers it distils."""
    module = toy_training(ema)
    torch.manual_seed(11)
    teacher = toy_model()
    module.objectives["taught"] = Distilled(teacher)
    return module


class Distilled(Objective):
    """The divergence from what a frozen model answers, which the checkpoint keeps with the rest."""

    def __init__(self, teacher: Model) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Distilled:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, model: Model, encoded: Any, batch: Any) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            wanted, _ = self.teacher.output(self.teacher.encode(batch), "answer")
        said, _ = model.output(encoded, "answer")
        return {"loss": torch.nn.functional.kl_div(said.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")}


BOUNDARIES = 24
KINDS = (
    Case(make=taught),
    Case(make=adapted, every_n_steps=2),
    Case(make=thawing, ema=0.9),
    Case(make=taught, workers=2, workers_after=0, accumulate=2, steps=8),
)


def trials(share: float, seed: int) -> Iterator[Outcome]:
    """112: each boundary of 24 steps with 0 and 2 workers, 40 random moments, 8 of several kills, 16 other runs."""
    draw = random.Random(seed)
    known: dict[Case, tuple[dict[str, Any], float]] = {}
    with folder("K1") as root:

        def whole(case: Case) -> tuple[dict[str, Any], float]:
            if case not in known:
                known[case] = straight(_new(root / f"whole-{len(known)}"), case)
            return known[case]

        def at_step(case: Case, step: int, place: Path) -> str | None:
            status = forked(lambda: train(place, case, case.workers, [KillAt("on_train_batch_start", step).callback()]))
            if not os.WIFSIGNALED(status):
                return f"was not killed (status {status})"
            return _compared(whole(case)[0], *trial(place, case, []))

        def at_times(case: Case, kills: int, place: Path) -> str | None:
            expected, seconds = whole(case)
            return _compared(expected, *trial(place, case, [draw.uniform(0, seconds) for _ in range(kills)]))

        made: list[tuple[str, Callable[[Path], str | None]]] = []
        for workers in (0, 2):
            case = Case(workers=workers, workers_after=workers, steps=BOUNDARIES)
            for step in part(range(BOUNDARIES), share):
                made.append((f"{workers} workers, step {step}", partial(at_step, case, step)))
        for i in part(range(40), share):
            case = CASES[i % len(CASES)]
            made.append((f"at random {i}: {case}", partial(at_times, case, 1)))
        for i in part(range(8), share):
            made.append((f"{2 + i % 2} kills {i}", partial(at_times, CASES[i % len(CASES)], 2 + i % 2)))
        for i in part(range(8), share):
            before, after = ((0, 2), (2, 0), (1, 2), (2, 1))[i % 4]
            case = Case(workers=before, workers_after=after)
            made.append((f"workers {before} to {after}, step {2 + i}", partial(at_step, case, 2 + i)))
        for i in part(range(8), share):
            case = KINDS[i % len(KINDS)]
            made.append((f"{case.make.__name__}, step {3 + i // 2}", partial(at_step, case, 3 + i // 2)))
        for i, (name, work) in enumerate(made):
            place = _new(root / f"trial-{i}")
            yield attempt(name, partial(work, place))
            shutil.rmtree(place)


def _compared(expected: dict[str, Any], found: dict[str, Any], hits: int) -> str | None:
    wrong = [key for key in expected if found.get(key) != expected[key]]
    return f"different after it went on: {', '.join(wrong)}" if wrong else None


def main(kills: int, seed: int) -> int:
    draw = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="kill_resume_"))
    whole = {case: straight(_new(root / f"whole-{i}"), case) for i, case in enumerate(CASES)}
    equal = hit = done = 0
    while hit < kills:
        case = CASES[done % len(CASES)]
        expected, seconds = whole[case]
        times = [round(draw.uniform(0, seconds), 2) for _ in range(2 if done % 5 == 4 else 1)]
        folder = _new(root / f"trial-{done}")
        found, hits = trial(folder, case, times)
        done, hit = done + 1, hit + (hits > 0)
        same = found == expected
        equal += same and hits > 0
        wrong = [key for key in expected if found.get(key) != expected[key]]
        print(
            f"{done:3} {'equal' if same else f'DIFFERENT in {wrong}'}  kills {hits} at {times}  {case}",
            flush=True,
        )
        if same:
            shutil.rmtree(folder)
    print(f"bitwise equal after SIGKILL: {equal} of {hit}")
    return 0 if equal == hit else 1


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.kills, options.seed))
