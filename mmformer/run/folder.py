"""The folder of a run: where it lies, who holds it, how far it came.

Imports nothing heavy: Hydra asks it for the folder before anything else is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

METRICS = "metrics.json"
"""Written last: a folder that has it belongs to a run that finished."""


class FolderError(RuntimeError):
    """The folder of a run cannot be used."""


def run_folder(runs: str, task_name: str, resume: str | None) -> str:
    """The folder for a run: a new one named by the time, or with `resume` (a folder or "auto") one to go on in."""
    task = Path(runs) / task_name
    if resume not in (None, "", "auto"):
        if not Path(str(resume)).is_dir():
            raise FolderError(f"resume={resume}: no such folder; resume=auto finds the newest unfinished run of {task}")
        return str(resume)
    if resume == "auto" and (found := unfinished(task)):
        return str(found[-1])
    return str(task / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))


def unfinished(task: Path) -> list[Path]:
    """Folders of runs that have a checkpoint, did not finish, and that no process holds; the newest last."""
    folders = sorted({path.parents[1] for path in task.glob("*/checkpoints/*.ckpt")})
    return [folder for folder in folders if not (folder / METRICS).is_file() and not held(folder)]


class Lock:
    """Holds a run folder for this process; the system lets go of it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self._file = open(folder / ".lock", "a+")  # noqa: SIM115
        if not _lock(self._file):
            self._file.seek(0)
            raise FolderError(
                f"{folder} is in use by {self._file.read().strip() or 'another process'}: wait, or end it"
            )
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def held(folder: Path) -> bool:
    """Whether another process holds a run folder."""
    with open(folder / ".lock", "a+") as file:
        return not _lock(file)


def _lock(file: Any) -> bool:
    try:
        import fcntl
    except ImportError:
        return True  # no such locks on this system: two processes in one folder are then the user's to avoid
    try:
        # Of the process and not of the open file, so that loader workers do not inherit it and outlive it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is whole or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
