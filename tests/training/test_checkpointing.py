"""A checkpoint is whole or absent: a write that fails at any point leaves the one before it."""

import errno
import os
import pickle
from contextlib import suppress

import pytest
import torch

from mmformer.training import checkpointing
from mmformer.training.checkpointing import (
    SUMS,
    AtomicCheckpointIO,
    CheckpointError,
    clean,
    keep_previous,
    load_whole,
    newest_whole,
    read_sums,
)

IO = AtomicCheckpointIO()


def save(path, number):
    IO.save_checkpoint({"state_dict": {"w": torch.full((1000,), float(number))}, "n": number}, path)


def number(path):
    return load_whole(path)["n"]


def test_what_is_saved_comes_back_and_is_hashed(tmp_path):
    save(tmp_path / "last.ckpt", 1)
    assert number(tmp_path / "last.ckpt") == 1
    assert read_sums(tmp_path) == [(checkpointing.sha256(tmp_path / "last.ckpt"), "last.ckpt")]
    assert sorted(p.name for p in tmp_path.iterdir()) == [SUMS, "last.ckpt"]


class Killed(BaseException):
    """Like a kill: no handler of ours runs."""


class Breaking:
    """Counts the calls that touch the disk and fails at one of them."""

    def __init__(self, patch, at, error):
        self.calls = 0
        # torch turns what is raised within a write into an error of its own: a kill there is one before the fsync
        writes = () if isinstance(error, Killed) else ((checkpointing._Hashing, "write"),)
        for module, name in ((os, "replace"), (os, "fsync"), *writes):
            patch.setattr(module, name, self.breaking(getattr(module, name), at, error))

    def breaking(self, real, at, error):
        def call(*args):
            self.calls += 1
            if self.calls == at:
                raise error
            return real(*args)

        return call


FULL = OSError(errno.ENOSPC, "No space left on device")


def sites(path, monkeypatch):
    with monkeypatch.context() as patch:
        counted = Breaking(patch, 0, FULL)
        save(path, 2)
    return range(1, counted.calls + 1)


def test_a_write_that_fails_anywhere_keeps_the_old_one_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save(path, 1)
    for at in sites(path, monkeypatch):
        with monkeypatch.context() as patch:
            Breaking(patch, at, FULL)
            with pytest.raises(CheckpointError, match=r"could not write .* MB free\): the earlier .* is intact"):
                save(path, 3)
        assert number(path) in (2, 3)
        assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]
        save(path, 2)


def test_a_kill_between_any_two_calls_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save(path, 1)
    for at in sites(path, monkeypatch):
        with monkeypatch.context() as patch, suppress(Killed):
            Breaking(patch, at, Killed())
            save(path, 3)
        assert newest_whole(tmp_path) == path
        assert number(path) in (2, 3)
        clean(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [SUMS, "last.ckpt"]
        save(path, 2)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_last_falls_back_to_the_newest_whole_one_and_says_so(tmp_path, damage):
    path = tmp_path / "last.ckpt"
    save(path, 1)
    keep_previous(path)
    save(path, 2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": bytes(data), "truncate": data[:-100], "empty": b""}[damage])
    said = []
    assert newest_whole(tmp_path, said.append) == tmp_path / "previous.ckpt"
    assert number(tmp_path / "previous.ckpt") == 1
    assert "damaged" in said[0]
    assert "previous.ckpt" in said[0]
    assert (tmp_path / "last.ckpt.bad").is_file()


def test_nothing_whole_is_nothing(tmp_path):
    assert newest_whole(tmp_path) is None
    save(tmp_path / "last.ckpt", 1)
    (tmp_path / "last.ckpt").write_bytes(b"x")
    assert newest_whole(tmp_path, lambda line: None) is None


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    with open(tmp_path / "bad.ckpt", "wb") as file:
        pickle.dump(Payload(), file)
    torch.save({"x": Payload()}, tmp_path / "worse.ckpt")
    for name in ("bad.ckpt", "worse.ckpt"):
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint of plain containers"):
            load_whole(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_kill_between_previous_and_last_leaves_nothing_behind(tmp_path):
    save(tmp_path / "last.ckpt", 1)
    for _ in range(3):
        keep_previous(tmp_path / "last.ckpt")
        assert sorted(p.name for p in tmp_path.iterdir()) == [SUMS, "last.ckpt", "previous.ckpt"]


def test_a_disk_that_fails_while_the_previous_is_kept_is_named(tmp_path, monkeypatch):
    save(tmp_path / "last.ckpt", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(FULL))
        with pytest.raises(CheckpointError, match=r"could not write .*previous\.ckpt .* MB free\)"):
            keep_previous(tmp_path / "last.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == [SUMS, "last.ckpt"]


def test_previous_names_the_one_before(tmp_path):
    path = tmp_path / "last.ckpt"
    for n in (1, 2, 3):
        keep_previous(path)
        save(path, n)
    assert (number(path), number(tmp_path / "previous.ckpt")) == (3, 2)
    assert len(read_sums(tmp_path)) == 3
