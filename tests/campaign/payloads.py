"""Files made to harm: each is refused with a reason, no code of it runs, and no memory is spent on it."""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from mmformer.checkpoints import RefusedTarget, load_model, save_model
from mmformer.checkpoints.build import build
from mmformer.checkpoints.folder import CONFIG, SUMS
from mmformer.checkpoints.source import open_source
from mmformer.checkpoints.store import RefusedFile
from mmformer.datasets.features import Picture, Waveform
from mmformer.datasets.manifest import read_manifest
from mmformer.datasets.sources import DecodeError
from mmformer.report.run import read_run
from mmformer.training.checkpointing import CheckpointError, load_whole, sha256
from mmformer.training.replay import replay
from tests.campaign.degenerate import claiming, wav_header
from tests.campaign.trials import Outcome, attempt, folder, in_fork, part
from tests.checkpoints.configs import run_config
from tests.checkpoints.test_hostile import ABUSES, NUMBERS, Payload, raw, scripted, tensor_pickle

MEMORY = 4 << 30
"""Bytes that a process which opens a bomb may map."""
MOST_GROWTH = 300_000
"""Kilobytes by which it may grow."""

Case = Callable[[Path], Any]
"""Writes a file into a folder and opens it; it is to raise one of REFUSALS."""

REFUSALS = (RefusedFile, RefusedTarget, CheckpointError, DecodeError, ValueError, pickle.UnpicklingError)


def canary(place: Path) -> Path:
    return place.parent / "canary"


def _saved(place: Path, name: str, zipped: bool, opener: Callable[[Path], Any]) -> Any:
    torch.save({"state_dict": {"w": Payload(canary(place))}}, place / name, _use_new_zipfile_serialization=zipped)
    return opener(place / name)


def _bare(place: Path, protocol: int, name: str, opener: Callable[[Path], Any]) -> Any:
    (place / name).write_bytes(pickle.dumps(Payload(canary(place)), protocol=protocol))
    return opener(place / name)


def _script(place: Path, call: str) -> Any:
    pickled = f"c{call.replace(' ', chr(10))}\n(S'touch {canary(place)}'\ntR.".encode()
    return open_source(scripted(place / "clip.pt", b"\x80\x02" + pickled))


def _target(place: Path, target: str) -> Any:
    return build({"_target_": target, "_args_": [f"touch {canary(place)}"]}, origin="config.json")


def _saved_target(place: Path) -> Any:
    """A saved model whose config asks for a command, with sums that fit."""
    config = run_config()
    save_model(place / "model", build(config["model"]), config)
    plain = json.loads((place / "model" / CONFIG).read_text())
    plain["model"]["heads"]["label"] = {"_target_": "os.system", "command": f"touch {canary(place)}"}
    (place / "model" / CONFIG).write_text(json.dumps(plain))
    names = [path.name for path in sorted((place / "model").iterdir()) if path.name != SUMS]
    sums = [f"{sha256(place / 'model' / name)}  {name}\n" for name in names]
    (place / "model" / SUMS).write_text("".join(sums))
    return load_model(place / "model")


def _yaml(place: Path) -> Any:
    (place / "metrics.json").write_text("{}")
    (place / "config.yaml").write_text(f"a: !!python/object/apply:os.system ['touch {canary(place)}']\n")
    return read_run(place)


PICKLES: dict[str, Case] = {
    "a pickle in model.pt": lambda p: _saved(p, "model.pt", True, open_source),
    "a legacy pickle in model.pth": lambda p: _saved(p, "model.pth", False, open_source),
    "a pickle called safetensors": lambda p: _saved(p, "model.safetensors", True, open_source),
    "a pickle in last.ckpt": lambda p: _saved(p, "last.ckpt", True, load_whole),
    "a legacy pickle in last.ckpt": lambda p: _saved(p, "last.ckpt", False, load_whole),
    "a bare pickle, protocol 0": lambda p: _bare(p, 0, "model.pt", open_source),
    "a bare pickle, protocol 2": lambda p: _bare(p, 2, "last.ckpt", load_whole),
    "a bare pickle, protocol 4": lambda p: _bare(p, 4, "model.bin", open_source),
    "a batch kept by a guard": lambda p: _saved(p, "step.pt", True, lambda path: replay(path, {})),
    "TorchScript that asks for system": lambda p: _script(p, "posix system"),
    "TorchScript that asks for eval": lambda p: _script(p, "builtins eval"),
    "a config that asks for os.system": lambda p: _target(p, "os.system"),
    "a saved model that asks for os.system": _saved_target,
    "YAML that asks for os.system": _yaml,
}

HEADERS = [
    "header longer than the file", "header of exabytes", "no header", "header is no JSON",
    "header is nested beyond reason", "one offset overlaps", "two tensors share bytes", "hole in the middle",
    "bytes behind", "shape that overflows", "type that lies", "key twice",
]  # fmt: skip


def _abuse(place: Path, name: str) -> Any:
    return open_source(raw(place / "x.safetensors", **ABUSES[name][0]))


def _member(place: Path, name: str, script: bool) -> Any:
    path = place / "model.pt"
    if script:
        scripted(path, tensor_pickle(), {"model/data/0": NUMBERS, name: b"x"})
    else:
        torch.save({"w": torch.zeros(2)}, path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"x")
    return open_source(path)


def _link(place: Path, kind: int) -> Any:
    path = scripted(place / "model.pt", tensor_pickle(), {"model/data/0": NUMBERS})
    member = zipfile.ZipInfo("model/link")
    member.external_attr = kind << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, "/etc/passwd")
    return open_source(path)


def _twice(place: Path) -> Any:
    path = scripted(place / "model.pt", tensor_pickle(), {"model/data/0": NUMBERS})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("model/data/0", bytes(16))
    return open_source(path)


def _data_archive(place: Path, cell: str) -> Any:
    """A data set in an archive, one of whose cells leads out of it."""
    with zipfile.ZipFile(place / "set.zip", "w") as archive:
        archive.writestr("sub/rows.csv", f"id,image\n1,{cell}\n")
        archive.writestr("secret.png", b"x")
    return read_manifest(place / "set.zip").source("image", 0)


ARCHIVES: dict[str, Case] = {
    **{
        f"{name} in {'TorchScript' if script else 'an archive of torch.save'}": partial(
            lambda p, name, script: _member(p, name, script), name=name, script=script
        )
        for name in ("../../canary", "/tmp/canary_mmformer", "model\\..\\canary")
        for script in (True, False)
    },
    "a link in an archive": lambda p: _link(p, 0o120777),
    "a name twice": _twice,
    "a data set that leads out of its archive": lambda p: _data_archive(p, "../../secret.png"),
    "a data set that names an absolute path": lambda p: _data_archive(p, "/secret.png"),
}


def _png(width: int, height: int) -> bytes:
    """A PNG of nothing but zeros, a few kilobytes of file for gigabytes of pixels."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes((1 + 3 * width) * 100)) for _ in range(height // 100)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    made = b""
    for name, data in ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")):
        made += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + made


def _hour() -> bytes:
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", 16_000, 1, format="FLAC") as file:
        for _ in range(60):
            file.write(np.zeros(60 * 16_000, dtype=np.float32))
    return stream.getvalue()


def _open(data: Callable[[], bytes], feature: Any) -> Case:
    return lambda place: feature(data())


def _zip_bomb(place: Path) -> Any:
    path = scripted(
        place / "a.pt", tensor_pickle(), {"model/code/x.py": bytes(600_000_000)}, compress_type=zipfile.ZIP_DEFLATED
    )
    return open_source(path)


BOMBS: dict[str, Case] = {
    "a PNG of 13000 x 13000": _open(lambda: _png(13_000, 13_000), Picture()),
    "a PNG of 20000 x 20000": _open(lambda: _png(20_000, 20_000), Picture()),
    "a PNG that claims 60000 x 60000": _open(lambda: claiming(60_000, 60_000), Picture()),
    "an hour of silence in a FLAC": _open(_hour, Waveform(16_000)),
    "a WAV that claims 4 GB": _open(lambda: wav_header(_wav(), size=0xFFFFFFF0), Waveform(16_000)),
    "600 MB of zeros in an archive": _zip_bomb,
}


def _wav() -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(100), 8000, format="WAV")
    return stream.getvalue()


def _cell(place: Path, cell: str) -> Any:
    """A manifest with such a cell."""
    (place / "rows.csv").write_text(f"id,image\n1,{cell}\n")
    (place.parent / "secret.png").write_bytes(b"x")
    if cell == "link.png":
        (place / cell).symlink_to(place.parent / "secret.png")
    source = read_manifest(place / "rows.csv").source("image", 0)
    assert source is not None
    return Picture()(source)


CELLS = ("../secret.png", "/etc/hostname", "link.png", "file:///etc/hostname", "http://127.0.0.1:9/x.png", "pipe:id")


def cases() -> dict[str, tuple[str, Case]]:
    """48 by name, each with its kind."""
    found: dict[str, tuple[str, Case]] = {name: ("pickle", case) for name, case in PICKLES.items()}
    found |= {f"safetensors: {name}": ("safetensors", partial(_abuse, name=name)) for name in HEADERS}
    found |= {name: ("archive", case) for name, case in ARCHIVES.items()}
    found |= {name: ("bomb", case) for name, case in BOMBS.items()}
    return found | {f"a manifest that names {cell}": ("path", partial(_cell, cell=cell)) for cell in CELLS}


def opened(place: Path, case: Case, bounded: bool) -> str | None:
    """Open a payload: what is wrong where it is not refused."""
    warnings.simplefilter("ignore")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if bounded:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY + _mapped(), resource.RLIM_INFINITY))
    try:
        case(place)
        return "it was opened"
    except REFUSALS as error:
        if isinstance(error, UnicodeError) or not str(error):
            return f"refused without a reason: {error!r}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return f"the process grew by {grown / 1000:.0f} MB" if bounded and grown > MOST_GROWTH else None


def _mapped() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def one(place: Path, kind: str, case: Case) -> str | None:
    place.mkdir(parents=True)
    said = in_fork(partial(opened, place, case, kind == "bomb"))
    if canary(place).exists() or Path("/tmp/canary_mmformer").exists():
        return "its code ran, or it wrote outside"
    return said


def trials(share: float, seed: int) -> Iterator[Outcome]:
    """48: 14 pickles and configs, 12 headers of safetensors, 10 archives, 6 bombs, 6 paths."""
    with folder("S1") as root:
        for i, (name, (kind, case)) in enumerate(part(list(cases().items()), share)):
            yield attempt(name, partial(one, root / f"{i}" / "in", kind, case))
