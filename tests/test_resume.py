"""A run that was killed and goes on equals the run that was never stopped: weights, curve and best, bit for bit.

The whole campaign is `python -m tests.campaign.kill_resume --kills 30`; each trial here is a fork of this process.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import torch

from mmformer.training.checkpoints import Checkpoints, other_versions, versions
from mmformer.training.interruption import Interrupted
from tests.campaign.kill_resume import CASES, Case, forked, straight, train
from tests.training.toy import Toy, toy_trainer, toy_training


class KillAt:
    """Kills the process itself in one of the hooks of a step."""

    def __init__(self, hook, step):
        self.hook, self.step = hook, step

    def callback(self):
        from pytorch_lightning.callbacks import Callback

        def kill(this, trainer, *args, **kwargs):
            if trainer.global_step == self.step:
                os.kill(os.getpid(), signal.SIGKILL)

        return type("Kill", (Callback,), {self.hook: kill})()


def killed_then_resumed(folder, case, hook, step):
    status = forked(lambda: train(folder, case, case.workers, [KillAt(hook, step).callback()]))
    assert os.WIFSIGNALED(status), "the kill did not hit"
    assert forked(lambda: train(folder, case, case.workers_after)) == 0
    return json.loads((folder / "result.json").read_text())


HOOKS = [
    ("on_train_batch_start", 0),
    ("on_train_batch_end", 4),
    ("on_train_batch_start", 7),
    ("on_validation_batch_end", 5),
    ("on_validation_end", 10),
    ("on_train_epoch_start", 5),
    ("on_train_end", 14),
]


@pytest.mark.parametrize(("hook", "step"), HOOKS)
def test_a_kill_in_any_hook_changes_nothing(tmp_path, hook, step):
    case = CASES[0]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected, _ = straight(tmp_path / "whole", case)
    assert killed_then_resumed(tmp_path / "killed", case, hook, step) == expected


def test_a_kill_in_the_last_validation_changes_nothing(tmp_path):
    case = CASES[-1]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected, _ = straight(tmp_path / "whole", case)
    assert killed_then_resumed(tmp_path / "killed", case, "on_validation_start", case.steps) == expected


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: f"workers{case.workers}-{case.workers_after}")
def test_workers_accumulation_average_and_token_budget(tmp_path, case: Case):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected, _ = straight(tmp_path / "whole", case)
    assert killed_then_resumed(tmp_path / "killed", case, "on_train_batch_start", case.steps - 3) == expected


def test_workers_do_not_change_a_run(tmp_path):
    found = []
    for workers in (0, 2):
        (tmp_path / str(workers)).mkdir()
        found.append(straight(tmp_path / str(workers), replace(CASES[0], workers=workers))[0])
    assert found[0] == found[1]


def test_a_damaged_last_checkpoint_costs_an_interval_and_no_bit(tmp_path, capfd):
    case = CASES[0]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected, _ = straight(tmp_path / "whole", case)
    folder = tmp_path / "killed"
    forked(lambda: train(folder, case, 0, [KillAt("on_train_batch_start", 10).callback()]))
    with open(folder / "checkpoints" / "last.ckpt", "r+b") as file:
        file.seek(5000)
        file.write(b"\x00damage\x00")
    assert forked(lambda: train(folder, case, 0)) == 0
    assert json.loads((folder / "result.json").read_text()) == expected
    assert "last.ckpt is damaged" in capfd.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start"])
def test_a_signal_saves_the_step_and_says_so(tmp_path, signum, hook):
    from pytorch_lightning.callbacks import Callback

    def send(this, trainer, *args, **kwargs):
        if trainer.global_step >= 5:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    data, module = Toy(), toy_training()
    data.setup()
    trainer = toy_trainer(tmp_path, every_n_steps=100, callbacks=[type("Send", (Callback,), {hook: send})()])
    with pytest.raises(Interrupted, match=signal.Signals(signum).name) as caught:
        trainer.fit(module, datamodule=data)
    assert caught.value.exit_code == 128 + signum
    assert signal.getsignal(signum) == before
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == (6 if hook == "on_train_batch_start" else 5)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_lets_the_workers_finish_the_step(tmp_path, signum):
    from pytorch_lightning.callbacks import Callback

    class Send(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 5:
                pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
                # by another process: of its parent a worker would know that it means to end it
                subprocess.run(["kill", f"-{signum.value}", *map(str, pids)], check=True)
                time.sleep(0.3)  # for a worker that would end by it to do so

    data, module = Toy(workers=1), toy_training()
    data.setup()
    with pytest.raises(Interrupted, match=signal.Signals(signum).name):
        toy_trainer(tmp_path, every_n_steps=100, callbacks=[Send()]).fit(module, datamodule=data)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6


def test_a_file_called_stop_ends_a_run(tmp_path):
    data, module = Toy(), toy_training()
    data.setup()
    (tmp_path / "STOP").touch()
    with pytest.raises(Interrupted):
        toy_trainer(tmp_path).fit(module, datamodule=data)
    assert not (tmp_path / "STOP").exists()


def test_no_checkpoint_is_written_within_an_accumulation(tmp_path):
    data, module = Toy(), toy_training()
    data.setup()
    trainer = toy_trainer(tmp_path, steps=4, accumulate=2, every_n_steps=1)
    seen = []
    keeper = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))
    real = trainer.save_checkpoint
    trainer.save_checkpoint = lambda path: (seen.append(trainer.fit_loop.epoch_loop.batch_idx), real(path))
    trainer.fit(module, datamodule=data)
    assert keeper.last_path.is_file()
    assert all((index + 1) % 2 == 0 or index == 4 for index in seen)


def test_other_versions_than_those_of_a_checkpoint_are_told_with_both(tmp_path):
    data, module = Toy(), toy_training()
    data.setup()
    toy_trainer(tmp_path, steps=3).fit(module, datamodule=data)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["versions"] == versions()
    assert other_versions(saved) == []
    assert other_versions({"versions": versions() | {"torch": "1.0"}}) == [f"torch 1.0 -> {versions()['torch']}"]
    assert other_versions({}) == [], "a checkpoint of before there were versions in it"
