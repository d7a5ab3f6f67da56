"""Decoders that hang, crash, raise, take their time or all memory, in a loader's worker."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mmformer.datasets.datamodule import Loaders
from mmformer.datasets.dataset import ManifestDataset
from mmformer.datasets.manifest import read_manifest
from mmformer.datasets.watchdog import watched
from tests.campaign.media import LOADING
from tests.campaign.trials import Note, Outcome, attempt, folder, in_fork, part
from tests.datasets.test_watchdog import REASONS, SECONDS, Evil

KINDS = ("hang", "kill", "crash", "memory", "wrong", "slow")


class Slow(Evil):
    """Takes its time, and no more than it may."""

    def __call__(self, value: Any) -> Any:
        if Path(value.name).stem == "slow":
            time.sleep(0.6 * SECONDS)
        return super().__call__(value)


def loaded(place: Path, kind: str) -> tuple[list[str], dict[str, str], float]:
    """Rows given out, rows listed, and the longest time between two batches."""
    names = ["a", kind, "b", "c"]
    for name in names:
        (place / f"{name}.bin").write_bytes(b"x")
    (place / "rows.csv").write_text("id,image\n" + "".join(f"{name},{name}.bin\n" for name in names))
    rows = read_manifest(place / "rows.csv", {"split": None})
    loaders = Loaders(replace(LOADING, eval_batch_size=1, decode_timeout=SECONDS), seed=0)
    feature: Any = Slow()
    loaders.splits = {"test": ManifestDataset(rows, None, {"image": watched(feature, SECONDS)})}
    kept: list[str] = []
    faults: dict[str, str] = {}
    longest, before = 0.0, time.monotonic()
    for batch in loaders.test_dataloader():
        kept += batch.ids
        faults |= {fault.id: fault.reason for fault in batch.faults}
        longest, before = max(longest, time.monotonic() - before), time.monotonic()
    return kept, faults, longest


def one(place: Path, kind: str, times: dict[str, float]) -> str | None:
    try:
        kept, faults, times[kind] = in_fork(partial(loaded, place, kind))
    except RuntimeError as error:
        named = "a fault of the program" in str(error) and "KeyError" in str(error)
        return None if kind == "wrong" and named else f"the loader ended: {error}"
    if kind == "wrong":
        return "a fault of the program was taken for one of the data"
    if kind == "slow":
        return None if kept == ["a", "slow", "b", "c"] and not faults else f"{kept}, {faults}"
    if kept != ["a", "b", "c"] or list(faults) != [kind]:
        return f"given out {kept}, listed {faults}"
    if not re.search(REASONS[kind], faults[kind]):
        return f"another reason: {faults[kind]}"
    return None if times[kind] < SECONDS + 5 else f"the message took {times[kind]:.1f} s"


def trials(share: float, seed: int) -> Iterator[Outcome]:
    """6 kinds of decoders."""
    times: dict[str, float] = {}
    for kind in part(KINDS, share):
        with folder("W1") as place:
            yield attempt(kind, partial(one, place, kind, times))
    if "hang" in times:
        yield Note(f"a hung decoder with decode_timeout={SECONDS:g}: the next batch came after {times['hang']:.1f} s")
