"""Loaders end with the process that they load for."""

from __future__ import annotations

import os
import select
import signal
import time

import pytest

from mmformer.batch import Batch
from mmformer.datasets import datamodule
from mmformer.datasets.datamodule import Loaders, Loading, vocabulary_facts
from mmformer.datasets.tokenizers import BPE, ByteTokenizer

LOADING = Loading(
    batch_size=2, batch_tokens=None, eval_batch_size=2, num_workers=2, timeout=60, decode_timeout=None, pin_memory=False
)
REAL = datamodule._start_worker


class Endless:
    """A split that says through a pipe when a batch is asked for; `seconds` is how long it takes to make one."""

    def __init__(self, pipe: int, seconds: float):
        self.pipe, self.seconds = pipe, seconds

    def __len__(self) -> int:
        return 1000

    def num_tokens(self) -> list[int]:
        return [1] * len(self)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        os.write(self.pipe, b"x")
        time.sleep(self.seconds)
        return Batch(ids=tuple(map(str, range(50_000))), inputs={})  # more than a pipe holds


def slow_start(split: Endless):
    def start(worker: int) -> None:
        REAL(worker)
        os.write(split.pipe, b"x")
        time.sleep(2)

    return start


@pytest.mark.parametrize("when", ["starting", "decoding", "handing over"])
def test_workers_end_when_their_parent_is_killed(when, monkeypatch):
    reading, writing = os.pipe()
    split = Endless(writing, seconds=60 if when == "decoding" else 0)
    if when == "starting":
        monkeypatch.setattr(datamodule, "_start_worker", slow_start(split))
    parent = os.fork()
    if not parent:
        try:
            os.setpgid(0, 0)  # with its workers, so that none is left behind when this test fails
            loaders = Loaders(LOADING, seed=0)
            loaders.splits = {"train": split}
            batches = iter(loaders.train_dataloader())
            time.sleep(60)
            next(batches)
        finally:
            os._exit(1)
    os.close(writing)  # now only the parent and its workers hold it
    assert os.read(reading, 1) == b"x"
    time.sleep(0.3)  # until the first batch fills its pipe
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    while select.select([reading], [], [], 30)[0] and os.read(reading, 64):
        pass
    alive = not select.select([reading], [], [], 0)[0]
    os.close(reading)
    if alive:
        os.killpg(parent, signal.SIGKILL)
    assert not alive, "a worker outlived its parent by 30 s"


def test_the_space_between_words_is_a_fact_where_it_is_an_id_of_its_own():
    apart, joined = ByteTokenizer(), BPE.train(["a b", "a b a", "b a b"] * 9, vocab_size=270)
    assert apart.encode("a b")[1] == vocabulary_facts(apart)["space_id"]
    assert len(joined.encode("a b")) == 2
    assert vocabulary_facts(joined)["space_id"] is None
    assert vocabulary_facts(None)["space_id"] is None
