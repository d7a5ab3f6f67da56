"""What is measured of a run: waiting is that for batches alone, and nothing of the run depends on being measured."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import SimpleProfiler

from mmformer.training import throughput
from mmformer.training.progress import ProgressLine
from mmformer.training.throughput import Speed, Throughput, peak_memory, throughput_of
from tests.training.toy import Toy, ToySplit, digest, toy_trainer, toy_training


class Kept(Logger):
    name, version = "kept", ""

    def __init__(self):
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(dict(metrics) | {"step": step})

    def log_hyperparams(self, *_, **__):
        pass


class Clock:
    """Stands still but for what it is told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def hook(self, seconds: float, *names: str) -> Callback:
        """A callback whose hooks take that long."""

        def tick(*_, **__):
            self.now += seconds

        return type("Tick", (Callback,), dict.fromkeys(names, tick))()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=found))
    return found


def run(folder, callbacks=(), steps=14, **options):
    data, module = Toy(), toy_training()
    data.setup()
    trainer = toy_trainer(folder, steps, callbacks=[Throughput()], **options)
    trainer.callbacks[1:1] = callbacks
    kept = Kept()
    trainer.loggers = [*trainer.loggers, kept]
    trainer.fit(module, datamodule=data)
    return module, trainer, [row for row in kept.rows if "speed/waiting" in row]


def test_samples_tokens_padding_memory_and_operations_are_logged(tmp_path):
    _, trainer, rows = run(tmp_path)
    assert [row["step"] for row in rows] == list(range(5, 15))  # the first is to set up, three are counted
    for row in rows:
        assert 0 < row["speed/samples_per_second"] < row["speed/tokens_per_second"]
        assert 0 < row["speed/waiting"] < 1
        assert row["speed/padding"] == 0
        assert row["speed/memory_gb"] == pytest.approx(peak_memory(torch.device("cpu")), rel=0.2)
        assert 0 < row["speed/mfu"] < 1
    assert throughput_of(trainer).speed.metrics().items() <= rows[-1].items()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_waiting_is_the_time_until_a_batch_is_there(tmp_path, clock, monkeypatch, accumulate):
    quick = ToySplit.__getitems__

    def slow(split, keys):
        clock.now += 3.0
        return quick(split, keys)

    monkeypatch.setattr(ToySplit, "__getitems__", slow)
    work = clock.hook(1.0, "on_after_backward")
    _, _, rows = run(tmp_path, [work], 8, accumulate=accumulate, limit_val_batches=0)
    assert [row["step"] for row in rows] == list(range(5 if accumulate == 1 else 3, 9))
    assert {row["speed/waiting"] for row in rows} == {0.75}
    assert {row["speed/samples_per_second"] for row in rows} == {8 / 4.0}


def test_checkpoints_validation_and_what_stands_behind_are_no_part_of_a_step(tmp_path, clock):
    step = clock.hook(2.0, "on_train_batch_start")
    late = clock.hook(7.0, "on_train_batch_end", "on_validation_start", "on_save_checkpoint", "on_train_epoch_end")
    _, _, rows = run(tmp_path, [step, late], every_n_steps=1)
    assert [row["step"] for row in rows] == list(range(5, 15))
    assert {row["speed/samples_per_second"] for row in rows} == {8 / 2.0}
    assert {row["speed/waiting"] for row in rows} == {0.0}


def test_a_run_is_the_same_measured_or_not(tmp_path):
    module, _, _ = run(tmp_path / "with")
    plain, data = toy_training(), Toy()
    data.setup()
    toy_trainer(tmp_path / "without").fit(plain, datamodule=data)
    assert digest(module) == digest(plain)
    with_, without = ((tmp_path / name / "metrics.csv").read_text() for name in ("with", "without"))
    assert with_ == without


def test_a_profiler_of_the_user_sees_what_it_saw_and_is_given_back(tmp_path):
    profiler = SimpleProfiler()
    _, trainer, rows = run(tmp_path, steps=6, profiler=profiler)
    assert rows
    assert trainer.profiler is profiler
    assert any("train_dataloader_next" in name for name in profiler.recorded_durations)


def test_an_exception_within_a_counted_batch_leaves_nothing_behind(tmp_path):
    class Fails(Callback):
        def on_before_backward(self, trainer, *_):
            if trainer.global_step == 2:
                raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run(tmp_path, [Fails()])
    assert torch._C._len_torch_dispatch_stack() == 0


def test_the_line_of_a_run_shows_what_is_measured(tmp_path, capsys):
    run(tmp_path, [ProgressLine()], steps=12)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert lines
    for word in ("samples/s", "tokens/s", "padding 0%", "waiting", "GB", "MFU", "ETA"):
        assert word in lines[-1]


def test_a_run_without_the_callback_shows_the_rest(tmp_path, capsys):
    data, module = Toy(), toy_training()
    data.setup()
    trainer = toy_trainer(tmp_path, 6)
    trainer.callbacks.insert(0, ProgressLine())
    trainer.fit(module, datamodule=data)
    assert "  ETA 0:00" in capsys.readouterr().out


def test_what_is_not_known_is_not_logged():
    speed = Speed(samples_per_second=1234.5, tokens_per_second=1e6, padding=0.25, waiting=0.0123)
    assert "speed/mfu" not in speed.metrics()
    assert json.loads(json.dumps(speed.metrics())) == speed.metrics()
    assert speed.line() == "1,234 samples/s  1,000,000 tokens/s  padding 25%  waiting 1.2%"
