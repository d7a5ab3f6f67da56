"""A filesystem without space: a small tmpfs where this process may mount one, else a limit on the size of files."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmformer.training.checkpointing import (
    AtomicCheckpointIO,
    CheckpointError,
    clean,
    keep_previous,
    load_whole,
    newest_whole,
)
from tests.campaign.trials import Note, Outcome, attempt, folder, in_fork, part

SIZE = 1_000_000
"""Bytes of a checkpoint."""
ROOM = (0.0, 0.02, 0.5, 0.99, 1.2, 1.9)
"""Space that is left, in checkpoints: for nothing, for the sums alone, for a part, for one but not for two."""


@contextmanager
def small_disk(root: Path) -> Iterator[Path | None]:
    """A filesystem of seven checkpoints; None where none can be mounted."""
    place = root / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={7 * SIZE}", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def content(number: int) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((SIZE // 4,), float(number))}, "n": number}


def save(place: Path, number: int) -> None:
    keep_previous(place / "last.ckpt")
    AtomicCheckpointIO().save_checkpoint(content(number), place / "last.ckpt")
    AtomicCheckpointIO().save_checkpoint(content(number), place / "best.ckpt")


def crowded(place: Path, room: float, temporary: Path | None) -> str | None:
    """Save where there is room for so many checkpoints more; what is wrong then."""
    if temporary is not None:
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    place.mkdir()
    save(place, 1)
    free = shutil.disk_usage(place).free
    ballast = place.parent / "ballast"
    ballast.write_bytes(bytes(max(0, free - int(room * SIZE))))
    try:
        save(place, 2)
        return "it went well, without space" if room < 1 else None
    except CheckpointError as error:
        if "MB free" not in str(error) or "is intact" not in str(error):
            return f"the error does not say what is left: {error}"
    if wrong := _left(place):
        return wrong
    ballast.unlink()
    save(place, 3)
    return None if load_whole(place / "last.ckpt")["n"] == 3 else "the next save does not go through"


def limited(place: Path, room: float) -> str | None:
    """The same by a limit on the size of a file, for who may not mount."""
    place.mkdir()
    save(place, 1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(min(room, 0.99) * SIZE), resource.RLIM_INFINITY))
    try:
        save(place, 2)
        return "it went well, beyond the limit"
    except CheckpointError:
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return _left(place)


def _left(place: Path) -> str | None:
    if left := [path.name for path in place.iterdir() if path.suffix == ".tmp"]:
        return f"left {left}"
    clean(place)
    said: list[str] = []
    found = newest_whole(place, said.append)
    if found is None or said:
        return f"the last good checkpoint is gone: {said}"
    return None if load_whole(found)["n"] in (1, 2) else "holds something else"


def trials(share: float, seed: int) -> Iterator[Outcome]:
    """12: six amounts of space, with TMPDIR on the same filesystem and on another."""
    cases = part([(room, same) for room in ROOM for same in (True, False)], share)
    with folder("K3") as root, small_disk(root) as disk:
        if disk is None:
            yield Note("no filesystem can be mounted here: a limit on the size of files stands for a full disk")
        for i, (room, same) in enumerate(cases):
            where = root / f"{i}" if disk is None else disk / f"{i}"
            where.mkdir()
            name = f"room for {room:g} checkpoints, TMPDIR {'here' if same else 'elsewhere'}"
            work = partial(limited, where / "ckpt", room)
            if disk is not None:
                work = partial(crowded, where / "ckpt", room, where if same else None)
            yield attempt(name, partial(in_fork, work))
            shutil.rmtree(where)
