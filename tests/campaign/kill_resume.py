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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmformer.training.checkpointing import newest_whole
from mmformer.training.module import Training
from tests.training.toy import Toy, result, toy_trainer, toy_training


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
