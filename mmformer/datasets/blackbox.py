"""What a loader's worker was reading when it died: a line of memory that it shares with the process it loads for."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_SIZE = 512
_PATIENCE = 1.0
_recorder: mmap.mmap | None = None
_of_workers: list[tuple[Any, mmap.mmap]] = []
_owner = 0

REMEDY = (
    "`mmformer data check` finds the file; data.decode_timeout=30 leaves it out and goes on; where memory is short,"
    " take fewer data.loader.num_workers or a smaller batch"
)


def boxes(count: int) -> list[mmap.mmap]:
    """One for each worker; none where processes do not share what they had before they were started."""
    forks = multiprocessing.get_start_method() == "fork"
    return [mmap.mmap(-1, _SIZE) for _ in range(count if forks else 0)]


def carry(box: mmap.mmap) -> None:
    """Let this process write into a box."""
    global _recorder
    _recorder = box


def carried() -> bool:
    """Whether this process has a box to write into."""
    return _recorder is not None


def note(line: str) -> None:
    """Say what is read next."""
    if _recorder is not None:
        _recorder[:] = line.encode("utf-8", "replace")[:_SIZE].ljust(_SIZE, b"\0")


def assign(workers: Iterable[Any], held: Sequence[mmap.mmap]) -> None:
    """Remember which worker, a process of multiprocessing, has which box."""
    global _owner
    if _owner != os.getpid():  # those of the process that this one was forked from
        _of_workers.clear()
        _owner = os.getpid()
    _of_workers[:] = [pair for pair in _of_workers if pair[0].is_alive()]
    _of_workers.extend(zip(workers, held, strict=False))


def last_words(error: BaseException) -> str | None:
    """What to say of an error of PyTorch's about a worker that died or hangs; None for any other error."""
    said = str(error).splitlines()[0] if str(error) else ""
    if "DataLoader worker" not in said and "DataLoader timed out" not in said:
        return None
    with _no_news():
        dead = [] if "timed out" in said else _dead()
    lines = [_read(box) for worker, box in _of_workers if not dead or worker in dead]
    last = "; ".join(dict.fromkeys(filter(None, lines)))
    how = ", ".join(_ended(worker) for worker in dead)
    what = f"a worker of the loader {how}" if how else said.strip().rstrip(".")
    return f"{what}; the last it read: {last or 'nothing yet'}; {REMEDY}"


@contextmanager
def _no_news() -> Iterator[None]:
    """Without PyTorch's handler, which raises the same once more when the system tells of the death."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _dead() -> list[Any]:
    """The workers that have ended; one that dies is told of before it can be asked how."""
    stop = time.monotonic() + _PATIENCE
    while not (found := [worker for worker, _ in _of_workers if worker.exitcode]) and time.monotonic() < stop:
        time.sleep(0.01)
    return found


def _ended(worker: Any) -> str:
    code = worker.exitcode
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _read(box: mmap.mmap) -> str:
    return box[:].rstrip(b"\0").decode("utf-8", "replace")
