"""What the blocks of the campaign have in common: a trial and its outcome, and forks to run harm in."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One thing that was tried: `detail` says what was seen where it failed, or why it could not be tried."""

    name: str
    passed: bool = True
    detail: str = ""
    skipped: bool = False


@dataclass(frozen=True)
class Note:
    """A number to publish that no bar is set for."""

    text: str


Outcome = Trial | Note


def part(items: Sequence[T], share: float) -> list[T]:
    """About a `share` of the items, at least one, drawn the same each time; in their order."""
    count = min(len(items), max(1, round(len(items) * share)))
    return [items[i] for i in sorted(random.Random(0).sample(range(len(items)), count))]


def attempt(name: str, work: Callable[[], str | None]) -> Trial:
    """A trial that fails with what `work` returns, or raises."""
    try:
        said = work()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return Trial(name=name, passed=not said, detail=said or "")


class Died(RuntimeError):
    """A fork ended by a signal, or without an answer."""


def in_fork(work: Callable[[], T], seconds: float = 120.0) -> T:
    """What `work` returns in a fork of this process; whatever it raises is raised here as its text.

    Raises:
        Died: the fork was killed, crashed, or took longer than `seconds`.
        RuntimeError: it raised.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(seconds) + 1)
            try:
                answer: tuple[bool, Any] = True, work()
            except Exception:
                answer = False, traceback.format_exc()
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    status = os.waitpid(pid, 0)[1]
    _end_group(pid)
    if os.WIFSIGNALED(status):
        raise Died(f"died by {signal.Signals(os.WTERMSIG(status)).name}")
    if not data:
        raise Died(f"ended without an answer (status {status})")
    good, found = pickle.loads(data)
    if not good:
        raise RuntimeError(found)
    return found


def _end_group(pid: int) -> None:
    """End whatever a fork has left running."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


@contextmanager
def folder(name: str, where: str | None = None) -> Iterator[Path]:
    """A folder for some trials, gone after them."""
    path = Path(tempfile.mkdtemp(prefix=f"campaign_{name}_", dir=where))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
