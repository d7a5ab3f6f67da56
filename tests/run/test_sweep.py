from __future__ import annotations

from types import SimpleNamespace

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode

from mmformer.run.sweep import SweepTable, ranked

JOBS = [
    {"job": "0", "lr": "1e-3", "seed": "0", "dim": "8", "val/acc": "0.5"},
    {"job": "1", "lr": "1e-3", "seed": "1", "dim": "8", "val/acc": "0.7"},
    {"job": "2", "lr": "1e-2", "seed": "0", "dim": "8", "val/acc": "0.9"},
    {"job": "3", "lr": "1e-2", "seed": "1", "dim": "8", "val/acc": "0.8"},
]


def test_runs_are_ranked_by_their_mean_over_seeds_under_what_differs():
    assert ranked(JOBS, "val/acc", "max") == [("lr=1e-2", [0.9, 0.8]), ("lr=1e-3", [0.5, 0.7])]
    assert [name for name, _ in ranked(JOBS, "val/acc", "min")] == ["lr=1e-3", "lr=1e-2"]
    assert [name for name, _ in ranked(JOBS, "val/acc", None)] == ["lr=1e-3", "lr=1e-2"]


def sweep(folder, number, mode=RunMode.MULTIRUN):
    hydra = {"mode": mode, "sweep": SimpleNamespace(dir=str(folder)), "job": SimpleNamespace(num=number)}
    return SimpleNamespace(hydra=SimpleNamespace(**hydra))


def job(value, status=JobStatus.COMPLETED, metric="val/mae", **given):
    config = SimpleNamespace(optimized_metric=metric, monitor="val/mae", monitor_mode="min")
    overrides = [f"{key}={word}" for key, word in given.items()]
    return JobReturn(overrides=overrides, cfg=config, _return_value=value, status=status)  # pyright: ignore


def test_every_job_is_a_line_of_the_table_and_the_best_is_said_first(tmp_path, capsys):
    table = SweepTable()
    table.on_job_end(sweep(tmp_path, 0), job(2.5, seed=0, lr="1e-3"))
    table.on_job_end(sweep(tmp_path, 1), job(RuntimeError("no"), JobStatus.FAILED, seed=0, lr="1e-2"))
    table.on_job_end(sweep(tmp_path, 2), job(1.5, seed=1, lr="1e-2"))
    table.on_multirun_end(sweep(tmp_path, None))
    assert (tmp_path / "sweep.csv").read_text() == "job,seed,lr,val/mae\n0,0,1e-3,2.5\n2,1,1e-2,1.5\n"
    said = capsys.readouterr().out.split("\n")
    assert said[1:4] == ["val/mae of 2 runs, best first", "  1.5000  lr=1e-2", "  2.5000  lr=1e-3"]


@pytest.mark.parametrize(("value", "mode"), [(None, RunMode.MULTIRUN), (1.0, RunMode.RUN)])
def test_a_single_run_and_one_that_optimises_nothing_have_no_table(tmp_path, capsys, value, mode):
    table = SweepTable()
    table.on_job_end(sweep(tmp_path, 0, mode), job(value, metric="val/mae" if value else None))
    table.on_multirun_end(sweep(tmp_path, None, mode))
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
