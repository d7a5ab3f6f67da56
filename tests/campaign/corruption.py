"""Damaged checkpoints: each is found by its hash, set aside, and the one before it is taken."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mmformer.training.checkpointing import load_whole, newest_whole
from tests.campaign.save_faults import content, save
from tests.campaign.trials import Outcome, attempt, folder, part

Damage = Callable[[bytes, bytes, random.Random], bytes]


def _truncated(new: bytes, old: bytes, draw: random.Random) -> bytes:
    return new[: draw.randrange(len(new))]


def _flipped(new: bytes, old: bytes, draw: random.Random) -> bytes:
    data = bytearray(new)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def _zeroed(new: bytes, old: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(new) - 64)
    stop = min(len(new), at + draw.choice((64, 512, len(new))))
    data = new[:at] + bytes(stop - at) + new[stop:]
    return data if data != new else _flipped(new, old, draw)


def _mixed(new: bytes, old: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(200, min(len(new), len(old)) - 200)
    data = old[:at] + new[at:]
    return data if data not in (new, old) else _flipped(new, old, draw)


def _swapped(new: bytes, old: bytes, draw: random.Random) -> bytes:
    """The file of another run, whole in itself."""
    return _OTHER[0]


def _grown(new: bytes, old: bytes, draw: random.Random) -> bytes:
    return new + draw.randbytes(draw.randrange(1, 600))


DAMAGES: dict[str, Damage] = {
    "truncated": _truncated,
    "a bit flipped": _flipped,
    "zeroed": _zeroed,
    "old and new mixed": _mixed,
    "of another run": _swapped,
    "grown": _grown,
}
COUNT = 200
_OTHER: list[bytes] = []


def one(good: Path, place: Path, damage: Damage, draw: random.Random) -> str | None:
    """Damage `last.ckpt` of a copy of a good folder; what is wrong with how that is taken."""
    shutil.copytree(good, place)
    last, previous = place / "last.ckpt", place / "previous.ckpt"
    (place / "best.ckpt").unlink()
    last.write_bytes(damage(last.read_bytes(), previous.read_bytes(), draw))
    said: list[str] = []
    found = newest_whole(place, said.append)
    if found != previous:
        return f"went on from {found}, having said {said}"
    if len(said) != 1 or "last.ckpt is damaged: its sha256" not in said[0] or "previous.ckpt" not in said[0]:
        return f"it was not found by its hash, or not said so: {said}"
    if not (place / "last.ckpt.bad").is_file() or last.exists():
        return "it was not set aside"
    return None if load_whole(found)["n"] == 1 else "the one before it holds something else"


def trials(share: float, seed: int) -> Iterator[Outcome]:
    """200 damages of one checkpoint, at random places."""
    draw = random.Random(seed)
    with folder("C1") as root:
        for name, number in (("good", 1), ("other", 7)):
            (root / name).mkdir()
            save(root / name, number)
        save(root / "good", 2)
        _OTHER[:] = [(root / "other" / "last.ckpt").read_bytes()]
        assert content(2)["n"] == 2
        for i in part(range(COUNT), share):
            name = list(DAMAGES)[i % len(DAMAGES)]
            yield attempt(f"{name} ({i})", partial(one, root / "good", root / f"{i}", DAMAGES[name], draw))
            shutil.rmtree(root / f"{i}", ignore_errors=True)
