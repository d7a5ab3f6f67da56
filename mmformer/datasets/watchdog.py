"""Work in a child process, which is killed when it takes too long and may crash without harm.

A decoder that hangs holds the interpreter's lock, so that nothing inside its own process can end it; one that crashes
takes its process along. Here that process is a fork of whoever asks (a loader's worker, or the main process), which
goes on with the next file in another fork. It costs a pickled file name to the child and the decoded item back.
It is no sandbox: the child may do whatever its parent may.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from mmformer.datasets.features import Feature
from mmformer.datasets.sources import DecodeError

MEMORY = 4 << 30
"""Bytes that decoding one file may take."""


class Killed(DecodeError):
    """The process that decoded a file was killed, or crashed."""


_IGNORED = ("SIGINT", "SIGTERM")  # they reach whole groups of processes; the child ends with its parent
_DEFAULT = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGABRT", "SIGALRM", "SIGCHLD")  # handlers of the parent say its own name
_GRACE = 1.0


class Watchdog:
    """Calls `work` in a child process that is forked when it is first needed, one call at a time.

    A call may take `seconds`, and `memory` bytes beyond what the process has. A copy of this in another process has a
    child of its own.

    Raises:
        ValueError: no time at all.
        OSError: a system that cannot fork.
    """

    def __init__(self, work: Callable[[Any], Any], seconds: float, memory: int = MEMORY):
        if seconds <= 0:
            raise ValueError(f"{seconds:g} seconds to decode a file: give more than 0, or null to wait for ever")
        if not hasattr(os, "fork"):
            raise OSError("decoding can be watched only where processes fork (Linux, macOS): set decode_timeout=null")
        self.work, self.seconds, self.memory = work, seconds, memory
        self._child: _Child | None = None
        self._deadline = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_child": None}

    def __call__(self, value: Any) -> Any:
        """`work(value)`. Raises DecodeError where that fails, hangs or crashes."""
        self.ask(value)
        return self.answer()

    def ask(self, value: Any) -> None:
        """Hand a value over."""
        message = pickle.dumps(value, protocol=5)
        try:
            self._started().connection.send_bytes(message)
        except OSError:  # it ended while it had nothing to do, as the system may choose when memory runs out
            self.close()
            self._started().connection.send_bytes(message)
        self._deadline = time.monotonic() + self.seconds

    @property
    def connection(self) -> Connection:
        """What becomes readable with the answer."""
        return self._started().connection

    @property
    def left(self) -> float:
        """Seconds that the present call may still take."""
        return max(0.0, self._deadline - time.monotonic())

    def answer(self) -> Any:
        """What `work` gave back for the value handed over.

        Raises:
            DecodeError: it refused the value or wanted too much memory; `Killed` where it took too long or crashed.
            RuntimeError: it raised anything else.
        """
        child = self._started()
        if not child.connection.poll(self.left):
            self.close()
            raise Killed(f"took longer than {self.seconds:g} s to decode, and was killed (decode_timeout)")
        try:
            kind, found = pickle.loads(child.connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise Killed(self._crashed()) from None
        if kind == "refused":
            raise DecodeError(found)
        if kind == "error":
            raise RuntimeError(f"decoding failed in the process of decode_timeout:\n{found}")
        return found

    def _crashed(self) -> str:
        child, self._child = self._child, None
        assert child is not None
        status = child.end(kill=False)
        if status is None or not os.WIFSIGNALED(status):
            return f"its decoder ended without a word (status {status})"
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"its decoder was killed by {name}" + (", maybe for its memory" if name == "SIGKILL" else "")

    def close(self) -> None:
        """End the child; the next call has a new one."""
        child, self._child = self._child, None
        if child is not None and child.owner == os.getpid():
            child.end(kill=True)

    def _started(self) -> _Child:
        if self._child is None or self._child.owner != os.getpid():
            self._child = _Child(self.work, self.seconds, self.memory)
        return self._child


class _Child:
    """A forked process that answers one message after the other; it ends when nobody can ask any more."""

    def __init__(self, work: Callable[[Any], Any], seconds: float, memory: int):
        self.owner = os.getpid()
        self.connection: Connection
        self.connection, theirs = Pipe()  # pyright: ignore[reportAttributeAccessIssue]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads here: the child needs none of them
            self.pid = os.fork()
        if not self.pid:
            _serve(work, theirs, seconds, memory)  # pyright: ignore[reportArgumentType]
        theirs.close()

    def end(self, kill: bool) -> int | None:
        """Wait for the end of the process, and give back its status; None for one that the system cannot end."""
        if kill:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.connection.close()
        stop = time.monotonic() + _GRACE
        while time.monotonic() < stop:
            try:
                done, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                return None
            if done:
                return status
            time.sleep(0.001)
        return None


def _serve(work: Callable[[Any], Any], connection: Connection, seconds: float, memory: int) -> NoReturn:
    """What the child does until nobody is left to ask; it never returns into the code it was forked from."""
    try:
        for names, handler in ((_IGNORED, signal.SIG_IGN), (_DEFAULT, signal.SIG_DFL)):
            for name in names:
                signal.signal(getattr(signal, name), handler)
        # Nothing inherited is kept open, or whoever waits for its other end would wait for this process too; and
        # nothing inherited is collected, as that would close numbers that belong to other files by then.
        gc.freeze()
        os.closerange(3, connection.fileno())
        os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        torch.set_num_threads(1)  # threads of a pool that did not come along would be waited for
        _bound_memory(memory)
        while True:
            value = pickle.loads(connection.recv_bytes())
            # The parent kills in time; this is for one that is gone, and needs no interpreter.
            signal.setitimer(signal.ITIMER_REAL, 2 * seconds + _GRACE)
            answer = pickle.dumps(_answered(work, value, memory), protocol=5)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(answer)
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _answered(work: Callable[[Any], Any], value: Any, memory: int) -> tuple[str, Any]:
    try:
        return "found", work(value)
    except DecodeError as error:
        return "refused", str(error)
    except MemoryError:
        return "refused", f"needs more than {memory / 1e6:,.0f} MB to decode"
    except Exception:
        return "error", traceback.format_exc()


def _bound_memory(memory: int) -> None:
    """Let allocations beyond `memory` fail, and let the system end this process first where memory is short."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bound = mapped + memory if most == resource.RLIM_INFINITY else min(mapped + memory, most)
    resource.setrlimit(resource.RLIMIT_AS, (bound, most))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


class Watched:
    """A feature whose files are decoded in a child process: one that hangs or crashes it is no more than a fault.

    Raises:
        ValueError: no time at all, or a feature of texts, which no decoder reads.
    """

    from_file: ClassVar[bool] = True

    def __init__(self, feature: Feature, seconds: float, memory: int = MEMORY):
        if not feature.from_file:
            raise ValueError(f"{type(feature).__name__} reads texts: only the decoding of files is watched")
        self.feature = feature
        self._watchdog = Watchdog(self._work, seconds, memory)

    @property
    def feature_dims(self) -> int:
        return self.feature.feature_dims

    def __call__(self, value: Any) -> Tensor:
        dtype, shape, data = self._ask("item", value)
        return torch.from_numpy(data).view(dtype).view(shape)

    def shape(self, value: Any) -> tuple[int, ...]:
        return self._ask("shape", value)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return self.feature.tokens(shape)

    def _ask(self, what: str, value: Any) -> Any:
        try:
            return self._watchdog((what, value))
        except Killed as error:
            # At once: the row is listed only with its batch.
            print(
                f"data: {getattr(value, 'name', type(value).__name__)}: {error}; left out", file=sys.stderr, flush=True
            )
            raise

    def _work(self, request: tuple[str, Any]) -> Any:
        what, value = request
        if what == "shape":
            return self.feature.shape(value)
        item = self.feature(value).contiguous()
        # As bytes of NumPy's, which pickle fast; torch would write a file for each.
        return item.dtype, tuple(item.shape), item.view(-1).view(torch.uint8).numpy()


def watched(feature: Feature, seconds: float | None) -> Feature:
    """The feature, watched if there is a limit and it reads files."""
    if seconds is None or not feature.from_file:
        return feature
    return Watched(feature, seconds)  # pyright: ignore[reportReturnType]: a property stands for a class's attribute
