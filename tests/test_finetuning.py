"""From one run to the next on the command line: start from its weights, adapt, go on, and probe."""

from __future__ import annotations

import json

import pytest
import torch

from mmformer.checkpoints import load_model
from mmformer.cli import main
from tests.test_train import SMALL, rows, train

TRAIN = [word for word in SMALL if not word.startswith(("task_name", "trainer.max_steps"))]
__all__ = ["rows"]  # a fixture


def run_of(folder, task):
    (found,) = (folder / "runs" / task).iterdir()
    return found


@pytest.fixture
def base(rows):
    code, said = train(rows, *TRAIN, "task_name=base", "trainer.max_steps=4")
    assert code == 0, said
    return run_of(rows, "base")


def test_adapters_of_a_run_are_saved_alone_and_merged(rows, base):
    pytest.importorskip("peft", reason="LoRA needs peft: pip install mmformer[peft]")
    source = f"pretrained={base}/checkpoints/best.ckpt"
    lora = [*TRAIN, source, "finetune=lora", "callbacks.checkpoints.every_n_steps=2"]
    code, said = train(rows, *lora, "task_name=lora", "trainer.max_steps=4")
    assert code == 0, said
    assert "M frozen" in said
    assert "optimizer:" in said
    run = run_of(rows, "lora")
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in name or ".heads." in name or "normalize" in name for name in kept)
    assert len(list((run / "checkpoints").glob("frozen-*.pt"))) == 1
    before, after = (load_model(folder / "model").model.state_dict() for folder in (base, run))
    assert before.keys() == after.keys()  # merged: no name of an adapter
    code, said = train(rows, *lora, f"resume={run}", "trainer.max_steps=8", "module.finetune.adapters.rank=2")
    assert code == 2
    assert "module.finetune.adapters.rank: 8 -> 2" in said
    code, said = train(rows, *lora, "task_name=wrong", "module.finetune.freeze=[encoder.*]")
    assert code == 2
    assert "error: freeze pattern 'encoder.*' matches no parameter; the model has encoders.text.*" in said


def test_a_run_is_probed_by_its_neighbours(rows, base, capsys):
    with pytest.raises(SystemExit) as done:
        main(["probe", str(base), "--k", "3", "--json"])
    assert not done.value.code
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["fused", "text", "image"]
    assert found["image"]["accuracy"] == 1.0  # dark or light
    assert found["fused"]["rows"] == 8
    for words, message in [
        (["--k", "100"], "k is 100 with"),
        (["--target", "nothing"], "nothing"),
        (["--split", "none"], "none"),
    ]:
        with pytest.raises(SystemExit) as done:
            main(["probe", str(base), *words])
        assert done.value.code == 2
        assert message in capsys.readouterr().err
