"""A worker that dies leaves word of what it was reading."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import suppress

import pytest

from mmformer.datasets import blackbox
from mmformer.datasets.datamodule import Loaders, Loading
from mmformer.datasets.dataset import ManifestDataset
from mmformer.datasets.manifest import read_manifest
from tests.datasets.test_watchdog import Evil


@pytest.mark.parametrize("kind", ["crash", "kill", "hang"])
def test_the_row_is_named_with_what_to_do(tmp_path, kind):
    names = ["a", "b", kind, "c"]
    for name in names:
        (tmp_path / f"{name}.bin").write_bytes(b"x")
    (tmp_path / "rows.csv").write_text("id,image\n" + "".join(f"{name},{name}.bin\n" for name in names))
    rows = read_manifest(tmp_path / "rows.csv", {"split": None})
    loading = Loading(
        batch_size=1,
        batch_tokens=None,
        eval_batch_size=1,
        num_workers=1,
        timeout=2,
        decode_timeout=None,
        pin_memory=False,
    )
    fork = os.fork()  # the handler of SIGCHLD that PyTorch installs raises wherever the process is by then
    if not fork:
        try:
            os.setpgid(0, 0)
            loaders = Loaders(loading, seed=0)
            loaders.splits = {"test": ManifestDataset(rows, None, {"image": Evil()})}
            list(loaders.test_dataloader())
        except RuntimeError as error:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # it would raise once more, while this is written
            (tmp_path / "said").write_text(str(blackbox.last_words(error)))
            os._exit(0)  # at once: the loader would wait for its worker
        finally:
            os._exit(0)
    os.waitpid(fork, 0)
    with suppress(ProcessLookupError):  # a worker that hangs with the interpreter's lock
        os.killpg(fork, signal.SIGKILL)
    said = (tmp_path / "said").read_text()
    cause = {
        "crash": "a worker of the loader was killed by SIGSEGV",
        "kill": "a worker of the loader was killed by SIGKILL",
        "hang": "DataLoader timed out after 2 seconds",
    }[kind]
    assert said.startswith(f"{cause}; the last it read: row '{kind}', {kind}.bin; `mmformer data check`")
    assert "data.decode_timeout=30" in said


def test_other_errors_are_not_its_business():
    assert blackbox.last_words(RuntimeError("CUDA out of memory")) is None
    assert blackbox.last_words(ValueError()) is None


def test_a_fork_knows_nothing_of_the_workers_of_its_parent():
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    process.start()
    blackbox.assign([process], blackbox.boxes(1))
    fork = os.fork()
    if not fork:
        code = 1
        try:
            blackbox.assign([], [])
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(fork, 0)[1] == 0
    process.kill()
    process.join()
    blackbox.assign([], [])
