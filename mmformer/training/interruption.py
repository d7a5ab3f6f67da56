"""Ending a run from outside without losing the step that is being made."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A run was asked to stop, has saved and has stopped."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Signals:
    """Remembers SIGTERM and Ctrl-C, or that a file was made, until the step is done; a second Ctrl-C quits at once."""

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._received = 0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take over from the handlers that are there; only the main thread may."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._before[signum] = signal.signal(signum, self._on_signal)

    def restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT and signum == signal.SIGINT:
            os._exit(128 + signum)
        self._received = signum
        name = signal.Signals(signum).name
        hint = "; press Ctrl-C again to quit at once" if signum == signal.SIGINT else ""
        # print() is not safe inside a handler that may have interrupted another print
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{name}: finishing the step{hint}\n".encode())

    def received(self) -> int:
        """The signal that asked to stop; SIGINT stands for the file; 0 for none."""
        if not self._received and self._stop_file.exists():
            self._stop_file.unlink(missing_ok=True)
            self._received = signal.SIGINT
        return self._received
