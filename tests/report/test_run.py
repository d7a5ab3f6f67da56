from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime

import pytest

from mmformer.report import describe_run, find_runs, read_run
from mmformer.report.run import read_curves, read_metrics
from tests.report.runs import write_run


def test_a_run_comes_back(tmp_path):
    folder = write_run(tmp_path / "runs" / "digits" / "now", count=30)
    run = read_run(folder)
    assert run.name == "digits"
    assert run.metrics["val/acc"] == 0.985
    assert run.curves["val/loss"].x == tuple(float(x) for x in range(0, 800, 40))
    assert run.about["data"]["test"]["text+image"] == 62
    assert run.about["parameters"] == 1_204_321
    assert len(run.faults) == 17
    assert run.predictions is not None
    assert len(run.predictions) == 30


def test_the_command_is_that_of_the_shell(tmp_path):
    words = ["python", "train.py", "data.path=my file.csv", "tags=[a,b]"]
    about = json.loads(describe_run(tmp_path, datetime.now(), words).read_text())
    assert shlex.split(about["command"]) == words
    assert {"python", "torch", "hydra-core"} <= set(about["versions"])


def test_the_start_is_that_of_the_run_and_not_of_its_report(tmp_path):
    began = datetime(2026, 3, 1, 8, 30, 12, tzinfo=UTC)
    about = json.loads(describe_run(tmp_path, began, ["train"], seconds=7200.0).read_text())
    assert datetime.fromisoformat(about["started"]) == began
    assert datetime.fromisoformat(about["started"]).utcoffset() is not None


def test_a_resumed_run_repeats_steps_and_the_last_counts(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,epoch,train/loss,val/acc\n10,0,3.0,\n20,0,2.0,0.5\n20,0,1.5,\n30,1,,nan\n30,1,1.0,0.75\n"
    )
    curves = read_curves(tmp_path)
    assert (curves["train/loss"].x, curves["train/loss"].y) == ((10.0, 20.0, 30.0), (3.0, 1.5, 1.0))
    assert (curves["val/acc"].x, curves["val/acc"].y) == ((20.0, 30.0), (0.5, 0.75))


def test_metrics_may_be_nested_and_hold_other_things(tmp_path):
    (tmp_path / "metrics.json").write_text('{"test": {"acc": 1, "best": true}, "val/acc": 0.5, "name": "x"}')
    assert read_metrics(tmp_path) == {"test/acc": 1.0, "val/acc": 0.5}


def test_runs_are_found_newest_first_and_not_inside_each_other(tmp_path):
    import os

    for age, name in enumerate(["b/2", "a/1", "c"]):
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        (folder / "metrics.json").write_text("{}")
        (folder / "model" / "config.yaml").write_text("{}")
        os.utime(folder, (1e9 - age, 1e9 - age))
    assert find_runs(tmp_path) == [tmp_path / "b" / "2", tmp_path / "a" / "1", tmp_path / "c"]
    assert find_runs(tmp_path / "c") == [tmp_path / "c"]
    assert find_runs(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", "{"),
        ("metrics.json", "[1]"),
        ("run.json", ""),
        ("config.yaml", "a: [1"),
        ("data_errors.jsonl", "{}\n{"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / "metrics.csv").write_text("step\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} (is damaged|holds a list)"):
        read_run(tmp_path)


def test_a_config_cannot_run_code(tmp_path):
    (tmp_path / "config.yaml").write_text(f"a: !!python/object/apply:os.system ['touch {tmp_path / 'canary'}']")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        read_run(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_what_is_no_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a run: it holds none of metrics\.json"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_run(tmp_path / "nowhere")
