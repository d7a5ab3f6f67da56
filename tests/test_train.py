"""`python train.py` from the command line to its folder and its exit code, each time in a fork of this process."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=nowhere.csv"], "nowhere.csv"),
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


def test_a_run_that_diverges_is_exit_code_3(rows):
    code, said = train(rows, *SMALL, "module.optimizer.lr=1e30", "trainer.gradient_clip_val=null")
    assert code == 3, said
    assert "the loss is not finite" in said


def test_testing_alone_judges_a_checkpoint(rows):
    train(rows, *SMALL)
    run = only_run(rows)
    code, said = train(rows, *SMALL, "fit=false", f"ckpt_path={run / 'checkpoints' / 'best.ckpt'}", "task_name=judged")
    assert code == 0, said
    (judged,) = (rows / "runs" / "judged").iterdir()
    assert json.loads((judged / "metrics.json").read_text()) == json.loads((run / "metrics.json").read_text())
