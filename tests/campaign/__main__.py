"""Harm of every kind done to mmformer, and what came of it.

    python -m tests.campaign --budget 600 --report campaign.html

Each block is a fork of one process that has imported everything. `--share 0.1` tries a tenth of each, `--only K2` one
block. Ends with 1 where a trial failed, or where the budget ended before all were made.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from tests.campaign.trials import Note, Trial

BLOCKS = {
    "K1": ("kill_resume", "SIGKILL, then on: the same run bit for bit"),
    "K2": ("save_faults", "harm at every call of a save: a whole checkpoint is left"),
    "K3": ("disk_full", "a disk that is full: the last good checkpoint is left"),
    "C1": ("corruption", "damaged checkpoints: found by hash, and the one before is taken"),
    "C2": ("mismatch", "checkpoints of other models: refused with every tensor named"),
    "D1": ("media", "damaged pictures and sounds through the loader: every one accounted for"),
    "D2": ("degenerate", "odd data: right, listed or refused with the reason"),
    "D3": ("properties", "laws over random data"),
    "D4": ("parsers", "random bytes as manifests and checksums"),
    "S1": ("payloads", "files made to harm: refused, the canary unborn"),
    "N1": ("numerics", "NaN and infinity: named to the row before they reach a weight"),
    "W1": ("workers", "decoders that hang, crash or eat memory: the run goes on"),
}
FIRST = ("K1", "N1", "D1")  # the longest, so that no processor waits for them at the end


@dataclass
class Result:
    """What is known of a block."""

    name: str
    seconds: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broke: str = ""

    @property
    def passed(self) -> int:
        return sum(trial.passed and not trial.skipped for trial in self.trials)

    @property
    def made(self) -> int:
        return sum(not trial.skipped for trial in self.trials)

    @property
    def failed(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.passed]

    @property
    def good(self) -> bool:
        return not self.failed and not self.broke


def run_block(name: str, share: float, seed: int, path: Path) -> None:
    """Make the trials of a block, and write each to a line of a file as it is done."""
    torch.set_num_threads(1)
    module = importlib.import_module(f"tests.campaign.{BLOCKS[name][0]}")
    with path.open("w", encoding="utf-8") as file:
        for outcome in module.trials(share, seed):
            plain = {"note": outcome.text} if isinstance(outcome, Note) else asdict(outcome)
            file.write(json.dumps(plain, default=str) + "\n")
            file.flush()
        file.write(json.dumps({"end": True}) + "\n")


def read_result(name: str, path: Path, seconds: float, ended: str) -> Result:
    """What the lines of a block say; without its last one the block broke off."""
    found = Result(name, seconds)
    whole = False
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        plain = json.loads(line)
        if "end" in plain:
            whole = True
        elif "note" in plain:
            found.notes.append(plain["note"])
        else:
            found.trials.append(Trial(**plain))
    found.broke = "" if whole else ended or "the block broke off"
    return found


def start(name: str, share: float, seed: int, folder: Path) -> int:
    """Fork a block, with all it says in a file of its own."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        run_block(name, share, seed, folder / f"{name}.jsonl")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def campaign(names: list[str], share: float, seed: int, budget: float, jobs: int, folder: Path) -> list[Result]:
    """Run blocks, `jobs` at a time, until all are done or the budget is spent."""
    waiting = sorted(names, key=lambda name: name not in FIRST)
    running: dict[int, tuple[str, float]] = {}
    found: dict[str, Result] = {}
    end = time.monotonic() + budget
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[start(name, share, seed, folder)] = name, time.monotonic()
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            name, began = running.pop(pid)
            said = "" if not os.WIFSIGNALED(status) else f"died by {signal.Signals(os.WTERMSIG(status)).name}"
            log = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
            ended = said or (log[-1] if status and log else "")
            found[name] = read_result(name, folder / f"{name}.jsonl", time.monotonic() - began, ended)
            show(found[name])
        elif time.monotonic() > end:
            for pid, (name, began) in running.items():
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                late = f"the budget of {budget:g} s ended"
                found[name] = read_result(name, folder / f"{name}.jsonl", time.monotonic() - began, late)
            found |= {name: Result(name, broke="not begun: the budget ended") for name in waiting}
            break
        else:
            time.sleep(0.05)
    return [found[name] for name in names]


def show(result: Result) -> None:
    """A line of a block that is done."""
    skipped = len(result.trials) - result.made
    said = f"{result.passed} of {result.made}" + (f", {skipped} skipped" if skipped else "")
    state = "" if result.good else "  FAILED"
    print(f"{result.name}  {said:>16}  {result.seconds:6.1f} s  {BLOCKS[result.name][1]}{state}", flush=True)
    for note in result.notes:
        print(f"      {note}")
    for reason in dict.fromkeys(trial.detail for trial in result.trials if trial.skipped):
        print(f"      skipped: {reason}")
    for trial in result.failed[:10]:
        print(f"      {trial.name}: {' '.join(trial.detail.split())[:400]}")
    if result.broke:
        print(f"      {result.broke}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all of it")
    parser.add_argument("--report", type=Path, help="write a page")
    parser.add_argument("--only", nargs="+", choices=list(BLOCKS), default=list(BLOCKS), help="these blocks")
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of each block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="blocks at a time")
    given = parser.parse_args()
    started = time.monotonic()
    for name in given.only:  # imported once, by the process that all forks come from
        importlib.import_module(f"tests.campaign.{BLOCKS[name][0]}")
    print(f"imported in {time.monotonic() - started:.0f} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="campaign_") as folder:
        results = campaign(given.only, given.share, given.seed, given.budget, given.jobs, Path(folder))
    total, good = sum(r.made for r in results), sum(r.passed for r in results)
    print(f"{good} of {total} trials in {time.monotonic() - started:.0f} s")
    if given.report:
        from tests.campaign.page import write_page

        print(write_page(given.report, results, {name: what for name, (_, what) in BLOCKS.items()}, vars(given)))
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
