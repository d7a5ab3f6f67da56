"""Damaged pictures and sounds through the loader of training, with checksums and without."""

from __future__ import annotations

import hashlib
import io
import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from mmformer.datasets.datamodule import Loaders, Loading
from mmformer.datasets.dataset import ManifestDataset
from mmformer.datasets.features import Picture, Waveform
from mmformer.datasets.integrity import write_checksums
from mmformer.datasets.manifest import read_manifest
from tests.campaign.trials import Note, Outcome, Trial, folder, in_fork, part

CHECKED, PLAIN = 2000, 500
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "wav": "WAV", "flac": "FLAC", "ogg": "OGG"}
DAMAGES = ("truncated", "a bit flipped", "a tail of zeros", "64 bytes overwritten")
LOADING = Loading(
    batch_size=32,
    batch_tokens=None,
    eval_batch_size=32,
    num_workers=1,
    timeout=60,
    decode_timeout=None,
    pin_memory=False,
)


def whole(seed: int = 0) -> dict[str, bytes]:
    """A file of each format."""
    rng = np.random.default_rng(seed)
    pixels = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((64, 48))
    sound = 0.2 * np.sin(np.arange(2000) / 7) + 0.02 * rng.standard_normal(2000)
    found = {}
    for suffix, form in FORMATS.items():
        stream = io.BytesIO()
        if suffix in ("jpg", "png", "webp"):
            pixels.save(stream, form)
        else:
            soundfile.write(stream, sound, 8000, format=form)
        found[suffix] = stream.getvalue()
    return found


def damaged(data: bytes, kind: str, draw: random.Random) -> bytes:
    """The bytes with one damage, which always changes something."""
    at = draw.randrange(len(data))
    if kind == "truncated":
        return data[:at]
    if kind == "a tail of zeros":
        found = data[:at] + bytes(len(data) - at)
    elif kind == "64 bytes overwritten":
        at = draw.randrange(max(1, len(data) - 64))
        found = data[:at] + draw.randbytes(64) + data[at + 64 :]
    else:
        found = data
    if found == data:
        found = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    return found


def read(path: Path, checksums: bool) -> tuple[set[str], dict[str, str]]:
    """The rows that a loader with a worker gives out, and the reasons of those that it lists."""
    rows = read_manifest(path, {"split": None, "id": "id"}, checksums=checksums)
    features: dict[str, Any] = {"image": Picture(longest=32), "audio": Waveform(8000)}
    loaders = Loaders(LOADING, seed=0)
    loaders.splits = {"test": ManifestDataset(rows, None, {n: features[n] for n in rows.modalities}, cache_bytes=0)}
    kept: set[str] = set()
    faults: dict[str, str] = {}
    for batch in loaders.test_dataloader():
        kept |= set(batch.ids)
        faults |= {fault.id: fault.reason for fault in batch.faults}
    return kept, faults


def write(root: Path, count: int, share: float, draw: random.Random) -> dict[str, str]:
    """Damaged files, a manifest of them with the checksums of whole ones; what is what by id."""
    root.mkdir()
    files, names, lines, sums = whole(), {}, ["id,image,audio"], {}
    for i in part(range(count), share):
        suffix, kind = list(FORMATS)[i % 6], DAMAGES[i // 6 % 4]
        name = f"{i}.{suffix}"
        (root / name).write_bytes(damaged(files[suffix], kind, draw))
        lines.append(f"r{i},{name}," if suffix in ("jpg", "png", "webp") else f"r{i},,{name}")
        names[f"r{i}"] = f"{FORMATS[suffix]} {kind}"
        sums[name] = hashlib.sha256(files[suffix]).hexdigest()
    (root / "rows.csv").write_text("\n".join(lines) + "\n")
    write_checksums(root / "rows.csv.sha256", sums)
    return names


def trials(share: float, seed: int) -> Iterator[Outcome]:
    """2,000 files with checksums, none of which may pass, and 500 without, each of which is given out or listed."""
    draw = random.Random(seed)
    with folder("D1") as root:
        for count, checksums in ((CHECKED, True), (PLAIN, False)):
            place = root / str(checksums)
            names = write(place, count, share, draw)
            try:
                kept, faults = in_fork(partial(read, place / "rows.csv", checksums), 300)
            except RuntimeError as error:
                yield Trial(name=f"{len(names)} files, checksums {checksums}", passed=False, detail=str(error)[-300:])
                continue
            for id, name in names.items():
                said = f"given out: {id in kept}, listed: {faults.get(id)}"
                good = (id in faults) != (id in kept) and not (checksums and id in kept)
                yield Trial(name=f"{name} ({id}, checksums {checksums})", passed=good, detail="" if good else said)
            if not checksums:
                yield from _rates(names, kept)


def _rates(names: dict[str, str], kept: set[str]) -> Iterator[Note]:
    total = Counter(name.split()[0] for name in names.values())
    silent = Counter(names[id].split()[0] for id in kept)
    rates = ", ".join(f"{form} {silent[form]} of {count}" for form, count in total.items())
    yield Note(f"decoded without a word where there are no checksums: {sum(silent.values())} of {len(names)} ({rates})")
