"""A decoder that hangs or crashes costs its item and nothing else, in the main process and in a loader's worker."""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmformer.datasets.datamodule import Loaders, Loading
from mmformer.datasets.dataset import ManifestDataset
from mmformer.datasets.features import Picture, Text
from mmformer.datasets.manifest import read_manifest
from mmformer.datasets.sources import DecodeError
from mmformer.datasets.tokenizers import ByteTokenizer
from mmformer.datasets.watchdog import Watchdog, Watched, watched

SECONDS = 2.0


@dataclass(frozen=True)
class Evil:
    """Decodes files, and does what the name of one says."""

    from_file: ClassVar[bool] = True
    feature_dims: ClassVar[int] = 0

    def __call__(self, value: Any) -> Tensor:
        harm(Path(value.name).stem)
        return torch.arange(5.0, dtype=torch.float32)

    def shape(self, value: Any) -> tuple[int, ...]:
        harm(Path(value.name).stem)
        return (5,)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return shape[0]


def harm(kind: str) -> str:
    if kind == "hang":  # in C, with the interpreter's lock
        ctypes.PyDLL(None).sleep(60)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "memory":
        np.ones(1 << 33, dtype=np.uint8)
    elif kind == "refuse":
        raise DecodeError("no picture")
    elif kind == "wrong":
        raise KeyError("a fault of the program")
    elif kind == "exit":
        os._exit(3)
    return kind


REASONS = {
    "hang": r"took longer than 2 s to decode, and was killed \(decode_timeout\)",
    "kill": "its decoder was killed by SIGKILL, maybe for its memory",
    "crash": "its decoder was killed by SIGSEGV$",
    "memory": "needs more than 4,295 MB to decode",
    "refuse": "no picture",
    "exit": "ended without a word",
}


def test_what_goes_wrong_is_said_and_the_next_one_is_answered():
    watchdog = Watchdog(harm, SECONDS)
    assert watchdog("well") == "well"
    for kind, reason in REASONS.items():
        started = time.monotonic()
        with pytest.raises(DecodeError, match=reason):
            watchdog(kind)
        assert time.monotonic() - started < SECONDS + 5
        assert watchdog("well") == "well"
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*a fault of the program"):
        watchdog("wrong")
    watchdog.close()


def test_one_that_ends_while_it_waits_is_replaced():
    watchdog = Watchdog(harm, SECONDS)
    watchdog("well")
    assert watchdog._child is not None
    os.kill(watchdog._child.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert watchdog("well") == "well"
    watchdog.close()


def test_a_copy_in_another_process_has_a_child_of_its_own():
    watchdog = Watchdog(harm, SECONDS)
    watchdog("well")
    copy = pickle.loads(pickle.dumps(watchdog))
    assert copy._child is None
    fork = os.fork()
    if not fork:
        found = 1
        try:
            assert watchdog._child is not None
            before = watchdog._child.pid
            found = not (watchdog("well") == "well" and watchdog._child.pid != before)
        finally:
            os._exit(found)
    assert os.waitpid(fork, 0)[1] == 0
    assert watchdog("well") == "well"
    watchdog.close()


def test_the_child_ends_with_who_asks_also_while_it_decodes(tmp_path):
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc to see whether a process that is nobody's child has ended")

    def work(value: str) -> str:
        (tmp_path / value).write_text(str(os.getpid()))
        return harm(value)

    for value in ("well", "hang"):
        parent = os.fork()
        if not parent:
            Watchdog(work, SECONDS).ask(value)
            while not (tmp_path / value).is_file():
                time.sleep(0.01)
            os._exit(0)
        os.waitpid(parent, 0)
        stat = Path("/proc", (tmp_path / value).read_text(), "stat")
        started = time.monotonic()
        while stat.exists() and stat.read_text().split()[2] != "Z":
            assert time.monotonic() - started < 10, f"the child outlived who asked ({value})"
            time.sleep(0.02)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 5, 3)])
def test_items_come_back_as_they_are(dtype, shape):
    item = (torch.rand(shape) * 9).to(dtype)

    class Any_(Evil):
        def __call__(self, value: Any) -> Tensor:
            return item

    feature = Watched(Any_(), SECONDS)  # pyright: ignore[reportArgumentType]
    found = feature("x")
    assert found.dtype == item.dtype
    assert torch.equal(found, item)
    feature._watchdog.close()


def test_a_watched_picture_equals_one_that_is_not(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    plain, seen = Picture(longest=16), watched(Picture(longest=16), 5.0)
    assert torch.equal(plain(tmp_path / "a.png"), seen(tmp_path / "a.png"))
    assert seen.shape(tmp_path / "a.png") == plain.shape(tmp_path / "a.png")
    assert (seen.from_file, seen.feature_dims, seen.tokens((4, 4))) == (True, 1, plain.tokens((4, 4)))
    with pytest.raises(DecodeError, match="no such file"):
        seen(tmp_path / "b.png")


def test_what_is_not_watched_stays_as_it_is():
    text, picture = Text(ByteTokenizer(), 5), Picture()
    assert watched(picture, None) is picture
    assert watched(text, 3.0) is text
    with pytest.raises(ValueError, match="Text reads texts: only the decoding of files is watched"):
        Watched(text, 3.0)
    with pytest.raises(ValueError, match="0 seconds to decode a file: give more than 0"):
        Watched(picture, 0.0)
    with pytest.raises(ValueError, match=r"data\.loader\.timeout=60 would end the run before .*=60"):
        loading(1, 60.0)


def loading(workers: int, seconds: float) -> Loading:
    return Loading(
        batch_size=4,
        batch_tokens=None,
        eval_batch_size=4,
        num_workers=workers,
        timeout=60,
        decode_timeout=seconds,
        pin_memory=False,
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_goes_on_and_lists_the_row(tmp_path, workers, capfd):
    names = ["a", "hang", "b", "crash", "c", "kill", "d", "refuse"]
    for name in names:
        (tmp_path / f"{name}.bin").write_bytes(b"x")
    (tmp_path / "rows.csv").write_text("id,image\n" + "".join(f"{name},{name}.bin\n" for name in names))
    rows = read_manifest(tmp_path / "rows.csv", {"split": None})
    loaders = Loaders(loading(workers, SECONDS), seed=0)
    loaders.splits = {"test": ManifestDataset(rows, None, {"image": watched(Evil(), SECONDS)}, cache_bytes=0)}
    for _ in range(2):  # the second time from what is known: nothing hangs again
        batches = list(loaders.test_dataloader())
        assert [name for batch in batches for name in batch.ids] == ["a", "b", "c", "d"]
        faults = {fault.id: fault.reason for batch in batches for fault in batch.faults}
        assert list(faults) == ["hang", "crash", "kill", "refuse"]
        assert all(re.search(REASONS[name], reason) for name, reason in faults.items())
    said = capfd.readouterr().err
    assert said.count("data: hang.bin: took longer than 2 s to decode") == (1 if not workers else 2)
    assert "refuse.bin" not in said, "what is merely broken is listed, not shouted"
