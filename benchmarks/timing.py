"""Time variants side by side on a machine that others use too.

Variants take turns, in an order that is reversed every other round, and what counts is the median over rounds of the
ratio within a round. The clock of a CPU is the processor time of this process on one thread: waiting for others does
not count. A GPU is timed by the wall clock around a synchronisation.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from mmformer.training.memory import keep_freed_memory
from mmformer.training.precision import fast_matmul

Step = Callable[[int], object]
"""What is timed; it gets the number of the round."""


@dataclass(frozen=True)
class Timings:
    """Seconds of every round of every variant; `base` is the variant that the others are compared with."""

    title: str
    base: str
    seconds: dict[str, list[float]]

    def median_ms(self, name: str) -> float:
        return 1e3 * median(self.seconds[name])

    def speed(self, name: str) -> float:
        """How many times as fast as the base: the median over rounds of (base / variant)."""
        pairs = zip(self.seconds[self.base], self.seconds[name], strict=True)
        return median(base / variant for base, variant in pairs)


def parse_args(description: str, rounds: int) -> argparse.Namespace:
    """The options that every benchmark has, and the arithmetic set as `train.py` sets it."""
    return prepare(parser(description, rounds).parse_args())


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has; some have more."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--json", type=Path, help="write the figures to this file too")
    return made


def prepare(args: argparse.Namespace) -> argparse.Namespace:
    """Set threads, arithmetic and memory as `train.py` does."""
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    fast_matmul(args.device)
    return args


def interleave(title: str, base: str, steps: Mapping[str, Step], rounds: int, device: torch.device) -> Timings:
    """Run every variant once a round, after one call each to warm up."""
    for step in steps.values():
        step(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps) if number % 2 == 0 else reversed(list(steps)):
            start = now(device)
            steps[name](number)
            seconds[name].append(now(device) - start)
    return Timings(title, base, seconds)


def now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_mb(step: Step, device: torch.device) -> float:
    """By how many MB (10^6 bytes) memory rises above what was there, in the second of two calls."""
    if device.type == "cuda":
        step(0)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(1)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    ours, theirs = Pipe()
    process = get_context("fork").Process(target=_peak, args=(step, theirs))
    process.start()
    found = ours.recv()
    process.join()
    return found


def _peak(step: Step, pipe: Connection) -> None:
    """In a process of its own: the allocator gives back what it keeps, and the mark of the highest starts anew."""
    step(0)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _kib("VmRSS")
    step(1)
    pipe.send((_kib("VmHWM") - before) * 1024 / 1e6)


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def show(found: list[Timings], args: argparse.Namespace) -> None:
    """Print a table, and write the figures where `--json` says."""
    table = Table("", "variant", "median ms", "min ms", "speed")
    for timings in found:
        for name, seconds in timings.seconds.items():
            cells = (f"{timings.median_ms(name):.1f}", f"{1e3 * min(seconds):.1f}", f"{timings.speed(name):.2f}x")
            table.add_row(timings.title, name, *cells, end_section=name == list(timings.seconds)[-1])
    Console().print(table)
    if args.json:
        rows = [
            {"title": t.title, "variant": name, "base": t.base, "speed": t.speed(name), "seconds": seconds}
            for t in found
            for name, seconds in t.seconds.items()
        ]
        args.json.write_text(json.dumps({"machine": machine(args), "results": rows}, indent=1))


def machine(args: argparse.Namespace) -> dict[str, str | int]:
    """Where the figures come from."""
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fp32_matmul": torch.get_float32_matmul_precision(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
