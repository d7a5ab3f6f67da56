"""Harm at every call that a save makes of the system: SIGKILL, no space, a failing disk, a short write, a power cut."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from mmformer.training import checkpointing
from mmformer.training.checkpointing import AtomicCheckpointIO, CheckpointError, clean, keep_previous, load_whole
from tests.campaign.trials import Outcome, attempt, folder, in_fork, part

HARMS = ("SIGKILL", "ENOSPC", "EIO", "short write", "power cut", "power cut, names lost")
OLD, NEW = 1, 2
AFTER = "after the save"


class Disk:
    """Stands between the checkpoint writer and the system, counts its calls, and does harm at one of them.

    It knows what is on the disk for good: a file's content from its fsync on, a name from the fsync of its folder on.
    """

    def __init__(self, at: int, harm: str) -> None:
        self.at, self.harm = at, harm
        self.calls: list[str] = []
        self.unsynced: dict[int, str] = {}  # inode -> its latest name
        self.renamed: list[tuple[str, str | None]] = []  # (name, copy of what it was), until the folder is synced
        self.real = {name: getattr(os, name) for name in ("replace", "fsync", "link", "unlink")}
        self.aside = tempfile.mkdtemp(dir=Path.cwd())

    @contextmanager
    def between(self) -> Iterator[Disk]:
        """Calls of the writer go through this."""
        checkpointing.open = self.open  # type: ignore[attr-defined]
        for name in self.real:
            setattr(os, name, getattr(self, name))
        try:
            yield self
        finally:
            del checkpointing.open  # type: ignore[attr-defined]
            for name, real in self.real.items():
                setattr(os, name, real)

    def here(self, call: str) -> bool:
        """Whether this call is the one to harm; other than in writes it is harmed at once."""
        self.calls.append(call)
        if len(self.calls) != self.at:
            return False
        if call != "write":
            self.strike()
        return True

    def strike(self) -> None:
        if self.harm.startswith("power"):
            self.cut_power(names="names" in self.harm)
        if self.harm in ("SIGKILL", "power cut", "power cut, names lost"):
            os.kill(os.getpid(), signal.SIGKILL)
        code = errno.ENOSPC if self.harm == "ENOSPC" else errno.EIO
        raise OSError(code, os.strerror(code))

    def cut_power(self, names: bool) -> None:
        """Leave on the disk what was synced, and no more."""
        for name in self.unsynced.values():
            if os.path.exists(name):
                os.truncate(name, 0)
        for name, before in reversed(self.renamed if names else []):
            with suppress(FileNotFoundError):
                self.real["unlink"](name)
            if before is not None:
                self.real["link"](before, name)

    def open(self, path: Any, mode: str = "r", *rest: Any) -> Any:
        if "w" not in mode:
            return open(path, mode, *rest)
        self.here("open")
        return _File(self, str(path))

    def replace(self, source: Any, target: Any) -> None:
        self.here("replace")
        before = None
        if os.path.exists(target):
            before = f"{self.aside}/{len(self.renamed)}-{len(self.calls)}"
            self.real["link"](target, before)
        inode = os.stat(source).st_ino
        self.real["replace"](source, target)
        self.renamed.append((str(target), before))
        if inode in self.unsynced:
            self.unsynced[inode] = str(target)

    def fsync(self, handle: int) -> None:
        self.here("fsync")
        self.real["fsync"](handle)
        self.unsynced.pop(os.fstat(handle).st_ino, None)
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            self.renamed.clear()

    def link(self, source: Any, target: Any, **how: Any) -> None:
        self.here("link")
        self.real["link"](source, target, **how)

    def unlink(self, path: Any, **how: Any) -> None:
        self.here("unlink")
        self.real["unlink"](path, **how)


class _File(io.FileIO):
    """A file whose writes may go wrong half way."""

    def __init__(self, disk: Disk, path: str) -> None:
        super().__init__(path, "w")
        self._disk = disk
        disk.unsynced[os.fstat(self.fileno()).st_ino] = path

    def write(self, data: Any) -> int:
        if self._disk.here("write"):
            half = super().write(bytes(data)[: len(bytes(data)) // 2])
            if self._disk.harm == "short write":
                return half
            self._disk.strike()
        return super().write(data)

    def flush(self) -> None:
        if not self.closed:
            self._disk.here("flush")


def content(number: int) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((500,), float(number))}, "n": number}


def save(place: Path, number: int) -> None:
    """What a run does: the old last becomes previous, then last is written, then best."""
    keep_previous(place / "last.ckpt")
    AtomicCheckpointIO().save_checkpoint(content(number), place / "last.ckpt")
    AtomicCheckpointIO().save_checkpoint(content(number), place / "best.ckpt")


def harmed_save(place: Path, at: int, harm: str) -> tuple[str, list[str]]:
    """Save with harm at a call: how it ended (in a fork that may be killed) and what was called."""
    os.chdir(place.parent)
    disk = Disk(at, harm)
    with disk.between():
        try:
            save(place, NEW)
        except CheckpointError as error:
            return f"refused: {error}", disk.calls
        except OSError as error:
            return f"raised: {error}", disk.calls
    if at > len(disk.calls):  # after the save
        disk.strike()
    return "saved", disk.calls


def sites(root: Path) -> list[str]:
    """The calls of a save that goes well."""
    place = prepared(root / "count")
    ended, calls = in_fork(partial(harmed_save, place, 0, ""))
    assert ended == "saved", ended
    return calls


def prepared(place: Path) -> Path:
    place.mkdir(parents=True)
    save(place, OLD)
    return place


def one(place: Path, at: int, harm: str, call: str) -> str | None:
    """What is wrong after harm at a call; None where all is as promised."""
    prepared(place)
    ended = "killed"
    with suppress(RuntimeError):  # the fork died, as it should
        ended, _ = in_fork(partial(harmed_save, place, at, harm))
    if harm in ("ENOSPC", "EIO", "short write"):
        if ended == "saved":
            return None if call == "link" else "the save says that it went well"  # where no link can be, a copy is
        if not ended.startswith("refused: could not write") or "MB free" not in ended:
            return f"another error than promised: {ended}"
        if left := [p.name for p in place.iterdir() if p.suffix == ".tmp"]:
            return f"left {left}"
    elif ended != "killed":
        return f"was not killed: {ended}"
    clean(place)
    if left := [p.name for p in place.iterdir() if p.suffix == ".tmp"]:
        return f"left {left} after the next start"
    said: list[str] = []
    found = checkpointing.newest_whole(place, said.append)
    if found is None or said:
        return f"not whole: {said}"
    load_whole(place / "best.ckpt")
    number = load_whole(found)["n"]
    if number not in (OLD, NEW):
        return f"{found.name} holds {number}"
    if call == AFTER and number != NEW:
        return f"the save had returned, but {found.name} holds {number}"
    save(place, NEW)
    if load_whole(place / "last.ckpt")["n"] != NEW or any(p.suffix == ".tmp" for p in place.iterdir()):
        return "the next save does not go through"
    return None


def chosen(calls: list[str]) -> list[tuple[int, str]]:
    """Every call with its number; of writes in a row, all alike, the first, one in the middle and the last."""
    found, start = [], 0
    for call, run in groupby(calls):
        size = len(list(run))
        kept = {0, size // 2, size - 1} if call == "write" else range(size)
        found += [(start + i + 1, call) for i in sorted(kept)]
        start += size
    return found


def trials(share: float, seed: int) -> Iterator[Outcome]:
    """Each call of a save, with each harm that can be done there."""
    with folder("K2") as root:
        calls = sites(root)
        places = [(at, call, harm) for at, call in chosen(calls) for harm in HARMS]
        places = [(at, call, harm) for at, call, harm in places if harm != "short write" or call == "write"]
        ends = [(len(calls) + 1, AFTER, harm) for harm in HARMS if harm.startswith("power")]
        for i, (at, call, harm) in enumerate([*part(places, share), *ends]):
            place = root / f"trial-{i}" / "checkpoints"
            yield attempt(f"{harm} at call {at} ({call})", partial(one, place, at, harm, call))
            shutil.rmtree(place.parent)
