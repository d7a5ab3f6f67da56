"""`python train.py` from the command line to its folder and its exit code, each time in a fork of this process."""

from __future__ import annotations

import csv
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmformer.cli import main as mmformer_command
from tests.campaign.kill_resume import forked

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "data=manifest",
    "data/tokenizer=bytes",
    "dim=16",
    "num_heads=2",
    "depth.image=0",
    "depth.audio=0",
    "depth.fusion=1",
    "data.loader.batch_size=8",
    "data.loader.num_workers=0",
    "trainer.max_steps=6",
    "trainer.log_every_n_steps=1",
    "logger=csv",
    "task_name=t",
]


@pytest.fixture
def rows(tmp_path):
    """Twenty pictures with a word, some of them broken or without one of the two."""
    lines = ["id,split,image,text,label"]
    for i in range(40):
        split = ["train", "train", "train", "val", "test"][i % 5]
        label = ["dark", "light"][i % 2]
        Image.new("RGB", (16, 16), (90 * (i % 2),) * 3).save(tmp_path / f"{i}.png")
        lines.append(f"r{i},{split},{'' if i % 7 == 3 else f'{i}.png'},{'' if i % 7 == 5 else 'how is it'},{label}")
    (tmp_path / "0.png").write_bytes(b"not a picture")
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def train(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run train.py; its exit code (negative: the signal) and what it said."""
    said = folder / "said.txt"

    def work():
        os.chdir(folder)
        with open(said, "wb") as out:
            for stream in (1, 2):
                os.dup2(out.fileno(), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        own = [] if any(a.startswith("data.path=") for a in arguments) else [f"data.path={folder / 'rows.csv'}"]
        sys.argv = [str(ROOT / "train.py"), *arguments, *own]
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as done:
            code = done.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    return os.waitstatus_to_exitcode(forked(work)), said.read_text()


def only_run(folder: Path) -> Path:
    (found,) = (folder / "runs" / "t").iterdir()
    return found


def test_a_run_leaves_its_folder_and_says_what_to_do_next(rows):
    code, said = train(rows, *SMALL)
    assert code == 0, said
    run = only_run(rows)
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"val/acc", "test/acc", "test/acc_t", "test/acc_i", "test/acc_ti"} <= set(metrics)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["facts"]["num_outputs"] == 2
    assert "audio" not in config["module"]["model"]["encoders"]
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {"best.ckpt", "last.ckpt", "SHA256SUMS"}
    assert (run / "model" / "model.safetensors").is_file()
    (fault,) = [json.loads(line) for line in (run / "data_errors.jsonl").read_text().splitlines()]
    assert (fault["id"], fault["column"]) == ("r0", "image")
    assert "the data have no audio" in said
    assert "mmformer predict" in said
    assert "tensorboard" in said or "dashboard" in said
    assert "resume=" in said
    assert len((run / "metrics.csv").read_text().splitlines()) >= 8


def brightness(folder: Path, label: Callable[[int], str]) -> Path:
    """Forty pictures that are darker or lighter, with a label of whatever kind."""
    lines = ["id,split,image,text,label"]
    for i in range(40):
        Image.new("L", (16, 16), 6 * i).save(folder / f"{i}.png")
        split = ["train", "train", "train", "val", "test"][i % 5]
        lines.append(f"r{i},{split},{i}.png,{'odd' if i % 2 else 'even'},{label(i)}")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return folder


def predicted(run: Path, rows: Path) -> list[dict[str, str]]:
    """What `mmformer predict` says of a manifest."""
    out = rows.with_name("out.csv")
    with pytest.raises(SystemExit) as caught:
        mmformer_command(["predict", str(run), "--input", str(rows), "--output", str(out)])
    assert not caught.value.code
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_column_of_numbers_trains_a_regression(tmp_path):
    rows = brightness(tmp_path, lambda i: f"{100 + i / 3:.2f}") / "rows.csv"
    code, said = train(tmp_path, *SMALL)
    assert code == 0, said
    run = only_run(tmp_path)
    assert {"val/mae", "test/rmse", "test/r2_ti"} <= set(json.loads((run / "metrics.json").read_text()))
    assert "always the mean of training" in (run / "report.html").read_text()
    table = predicted(run, rows)
    assert list(table[0]) == ["id", "prediction", "fault"]
    assert [row["id"] for row in table] == [f"r{i}" for i in range(40)]
    assert all(90 < float(row["prediction"]) < 125 for row in table), "in the units of the column"


def test_cells_of_several_labels_train_a_classifier_of_each(tmp_path):
    said_of = lambda i: "|".join(["light"] * (i > 13) + ["odd"] * (i % 2) + ["any"])  # noqa: E731
    rows = brightness(tmp_path, said_of) / "rows.csv"
    code, said = train(tmp_path, *SMALL, "trainer.max_steps=12")
    assert code == 0, said
    run = only_run(tmp_path)
    assert {"val/map", "test/f1", "test/map_t"} <= set(json.loads((run / "metrics.json").read_text()))
    assert "mean average precision" in (run / "report.html").read_text()
    table = predicted(run, rows)
    assert list(table[0]) == ["id", "prediction", "confidence", "fault"]
    for row in table:
        labels, shares = row["prediction"].split("|"), row["confidence"].split("|")
        assert set(labels) <= {"light", "odd", "any"}
        assert len(labels) == len(shares)
        assert all(float(share) >= 0.5 for share in shares)


def test_a_retrieval_keeps_the_best_by_its_recall_and_shows_what_it_found(tmp_path):
    brightness(tmp_path, str)
    objective = ["objective@module.objectives=[contrastive]", "head@module.model.heads=[embedding]"]
    code, said = train(tmp_path, *SMALL, *objective, "~fusion@module.model.fusion", "data.columns.label=null")
    assert code == 0, said
    run = only_run(tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"test/t2i_r@1", "test/i2t_r@10", "test/t2i_median_rank", "test/r@1"} <= set(metrics)
    assert not [name for name in metrics if name.endswith("_ti")], "no embedding depends on other modalities"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["monitor"], config["monitor_mode"]) == ("val/mean_recall", "max")
    assert "What was found" in (run / "report.html").read_text()


def test_compiled_layers_train_to_the_same_losses(rows):
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("needs a C++ compiler, as torch.compile does")
    words = [*SMALL, "trainer.max_steps=3", f"data.path={rows / 'rows.csv'}", "test=false"]
    code, said = train(rows, *words, "task_name=plain")
    assert code == 0, said
    # without the checks of types that a fork of this process has, and that no compiled code has
    command = [sys.executable, str(ROOT / "train.py"), *words, "extras.compile=true", "task_name=compiled"]
    done = subprocess.run(command, cwd=rows, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = []
    for name in ("plain", "compiled"):
        (run,) = (rows / "runs" / name).iterdir()
        with (run / "metrics.csv").open(newline="") as file:
            cells = [(key, cell) for row in csv.DictReader(file) for key, cell in row.items()]
        losses.append([float(cell) for key, cell in cells if "loss" in key and cell])
    assert len(losses[0]) >= 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_killed_run_goes_on_to_the_same_numbers(rows):
    from mmformer.training.checkpoints import Checkpoints

    code, said = train(rows, *SMALL, "task_name=whole")
    assert code == 0, said
    (whole,) = (rows / "runs" / "whole").iterdir()
    real = Checkpoints.save_last

    def killing(self, trainer):
        real(self, trainer)
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save_last = killing
    try:
        code, said = train(rows, *SMALL, "callbacks.checkpoints.every_n_steps=2")
    finally:
        Checkpoints.save_last = real
    assert code == -signal.SIGKILL, said
    assert not (only_run(rows) / "metrics.json").exists()
    code, said = train(rows, *SMALL, "callbacks.checkpoints.every_n_steps=2", "resume=auto")
    assert code == 0, said
    assert "resume: " in said
    resumed = only_run(rows)
    for name in ("metrics.json", "metrics.csv"):
        assert (resumed / name).read_text() == (whole / name).read_text()


def test_another_model_is_no_resumption(rows):
    train(rows, *SMALL)
    run = only_run(rows)
    code, said = train(rows, *SMALL, f"resume={run}", "depth.fusion=2", "trainer.max_steps=8")
    assert code == 2
    assert "trainer.max_steps: 6 -> 8" in said
    assert "error: " in said.splitlines()[-1]
    assert "allow_changes=true" in said.splitlines()[-1]
    code, said = train(rows, *SMALL, f"resume={run}", "trainer.max_steps=8")
    assert code == 0, said
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith("8,")


def test_a_signal_saves_and_prints_the_command_that_goes_on(rows):
    (rows / "stop.py").write_text(
        "import os, signal\nfrom pytorch_lightning.callbacks import Callback\n"
        "class Stop(Callback):\n    def on_train_batch_start(self, *_):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    sys.path.insert(0, str(rows))
    try:
        code, said = train(rows, *SMALL, "+callbacks.stop._target_=stop.Stop")
    finally:
        sys.path.remove(str(rows))
    assert code == 143, said
    assert f"resume={only_run(rows).relative_to(rows)}" in said
    assert (only_run(rows) / "checkpoints" / "last.ckpt").is_file()


def test_a_sweep_makes_a_folder_for_each_job(rows):
    code, said = train(rows, "-m", *SMALL, "seed=0,1")
    assert code == 0, said
    assert [p.name for p in sorted(only_run(rows).iterdir()) if p.name.isdecimal()] == ["0", "1"]
    for job in ("0", "1"):
        assert (only_run(rows) / job / "metrics.json").is_file()
    code, said = train(rows, "-m", *SMALL, "seed=0,1", "trainer=ddp_sim")
    assert code == 2
    assert "each process would start the whole sweep again" in said


def test_the_sweep_of_learning_rates_keeps_and_ranks_what_it_reached(rows):
    values = ["module.optimizer.lr=1e-3,1e-2", "seed=0", "trainer.max_steps=2"]
    code, said = train(rows, *SMALL, "hparams_search=lr", *values)
    assert code == 0, said
    (sweep,) = (rows / "runs" / "t").iterdir()
    with (sweep / "sweep.csv").open(newline="") as file:
        jobs = list(csv.DictReader(file))
    assert [job["module.optimizer.lr"] for job in jobs] == ["0.001", "0.01"]
    for job in jobs:
        metrics = json.loads((sweep / job["job"] / "metrics.json").read_text())
        assert float(job["val/acc"]) == metrics["val/acc"]
    assert "val/acc of 2 runs, best first" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=nowhere.csv"], "nowhere.csv"),
        (["data.columns.label=null"], "predicts the label, and the data have none"),
        (["data.columns.image=photo"], "no column 'photo'"),
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed on a CPU"),
        (["trainer.max_epoch=1"], "did you mean 'trainer.max_epochs'?"),
        (["+trainer.max_epoch=1"], "max_epoch"),
        (["experiment=bog"], "no option 'bog' in group 'experiment'"),
        (["resume=nowhere"], "resume=nowhere: no such folder"),
        (["ckpt_path=nowhere.ckpt"], "no such file"),
        (["data.path=???"], "data.path has no value"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(rows, arguments, message):
    code, said = train(rows, *SMALL, *arguments)
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in said


def test_a_run_that_diverges_is_exit_code_3_and_can_be_looked_into(rows, capsys):
    code, said = train(rows, *SMALL, "module.optimizer.lr=1e30", "trainer.gradient_clip_val=null")
    assert code == 3, said
    assert "is nan at step" in said
    (kept,) = (only_run(rows) / "nonfinite").glob("*.pt")
    assert str(kept.relative_to(rows)) in said
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        mmformer_command(["debug", "batch", str(kept)])
    assert not caught.value.code
    found = capsys.readouterr().out
    assert "objectives: answer" in found or "weights:" in found or "layer:" in found


def test_a_number_that_is_infinite_is_named_by_its_row(tmp_path):
    brightness(tmp_path, lambda i: "inf" if i == 12 else f"{i}")
    code, said = train(tmp_path, *SMALL)
    assert code != 0
    assert "r12" in said, said


def test_without_validation_the_last_step_is_the_model(rows):
    code, said = train(rows, *SMALL, "trainer.limit_val_batches=0", "test=false")
    assert code == 0, said
    run = only_run(rows)
    assert (run / "model" / "model.safetensors").exists()
    assert not (run / "checkpoints" / "best.ckpt").exists()


def test_testing_alone_judges_a_checkpoint(rows):
    train(rows, *SMALL)
    run = only_run(rows)
    code, said = train(rows, *SMALL, "fit=false", f"ckpt_path={run / 'checkpoints' / 'best.ckpt'}", "task_name=judged")
    assert code == 0, said
    (judged,) = (rows / "runs" / "judged").iterdir()
    assert json.loads((judged / "metrics.json").read_text()) == json.loads((run / "metrics.json").read_text())
