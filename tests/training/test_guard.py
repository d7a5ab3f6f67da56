"""Nothing that is not finite reaches the weights, and what brought it is named to the row."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from mmformer.batch import Batch
from mmformer.objectives import Classes
from mmformer.objectives.objective import Objective
from mmformer.training.diagnosis import diagnose, from_plain, to_plain
from mmformer.training.finetune import Finetune
from mmformer.training.guard import Guard, Rollback, Skip, Stop, Warn
from mmformer.training.module import NonFiniteLoss
from tests.helpers import random_batch, small_model
from tests.training.toy import Toy, digest, toy_trainer, toy_training

BAD = "row-13"


class Poison(Objective):
    """Harmless but for one row, whose loss, or only whose gradient, is not finite."""

    def __init__(self, gradient: bool = False, row: str = BAD, size: float = math.nan):
        super().__init__()
        self.gradient, self.row, self.size = gradient, row, size

    def forward(self, model, encoded, batch: Batch):
        value = next(model.parameters()).sum()
        if self.row not in batch.ids:
            return {"loss": value * 0.0}
        if self.gradient:  # the square root of nothing: 0, and so steep that no number says how much
            return {"loss": (value - value.detach()).abs().sqrt()}
        return {"loss": value * 0.0 + self.size}


class Steps(Callback):
    """The weights behind every step."""

    def __init__(self):
        self.seen: list[str] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(digest(pl_module.model))


def fit(folder, nonfinite, poison=None, spike=None, steps=14, finetune=None, **options):
    module = toy_training(ema=0.9, finetune=finetune)
    module.objectives["poison"] = poison or Poison()
    guard = Guard(str(folder / "nonfinite"), str(folder / "checkpoints" / "last.ckpt"), nonfinite, spike, **options)
    watch = Steps()
    trainer = toy_trainer(folder, steps=steps, callbacks=[guard, watch])
    data = Toy()
    data.setup()
    trainer.fit(module, datamodule=data)
    return module, guard, watch


@pytest.mark.parametrize("gradient", [False, True])
def test_stopping_names_the_row_and_leaves_the_weights(tmp_path, gradient):
    with pytest.raises(NonFiniteLoss) as caught:
        fit(tmp_path, Stop(), Poison(gradient))
    said = str(caught.value)
    assert f"rows: {BAD}\n" in said, said
    assert "not updated" in said
    assert ("objectives: poison is nan" in said) != gradient
    (kept,) = (tmp_path / "nonfinite").glob("*.pt")
    report = json.loads(kept.with_suffix(".json").read_text())
    assert report["rows"] == [BAD]
    assert len(report["losses"]) == report["step"]
    saved = torch.load(kept, weights_only=True)
    assert BAD in from_plain(saved["batch"]).ids
    assert all(bool(value.isfinite().all()) for value in saved["weights"].values())


def test_skipping_leaves_out_that_step_and_no_other(tmp_path, capsys):
    module, _, watch = fit(tmp_path, Skip())
    same = [a == b for a, b in zip(watch.seen[:-1], watch.seen[1:], strict=True)]
    said = capsys.readouterr().out
    assert same.count(True) == said.count("the step is left out") > 0
    assert not all(same)
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_skipping_for_ever_ends_the_run(tmp_path):
    class Always(Poison):
        def forward(self, model, encoded, batch):
            return {"loss": next(model.parameters()).sum() * math.nan}

    with pytest.raises(NonFiniteLoss, match="3 steps in a row were left out"):
        fit(tmp_path, Skip(limit=3), Always())


@pytest.mark.parametrize("freeze", [[], ["encoders.image.*"]])
def test_rolling_back_gives_the_weights_of_the_last_checkpoint(tmp_path, capsys, freeze):
    _, guard, watch = fit(tmp_path, Rollback(), finetune=Finetune(freeze=freeze, train=[], unfreeze=[], adapters=None))
    said = [line for line in capsys.readouterr().out.splitlines() if "back to the weights of step " in line]
    assert guard.rolled_back == len(said) > 0
    assert len(set(watch.seen)) > 5
    kept = [json.loads(path.read_text())["step"] for path in sorted((tmp_path / "nonfinite").glob("*.json"))]
    places = [place for place in kept if place >= 3]  # from where there is a checkpoint on
    for place, line in zip(places, said, strict=True):
        assert watch.seen[place] == watch.seen[int(line.split("back to the weights of step ")[1]) - 1]


def test_a_leap_of_the_loss_is_seen_and_no_other_step(tmp_path, capsys):
    leap = Poison(size=1e4)
    fit(tmp_path, Stop(), leap, Warn(), window=4)
    said = capsys.readouterr().out
    assert said.count("leaps") >= 1
    assert all(BAD in line for line in said.splitlines() if "leaps" in line)
    _, _, watch = fit(tmp_path / "skip", Stop(), leap, Skip(), window=4)
    assert any(a == b for a, b in zip(watch.seen[:-1], watch.seen[1:], strict=True))


def test_a_guard_that_finds_nothing_changes_nothing(tmp_path):
    quiet = Poison(row="none")
    with_guard, *_ = fit(tmp_path / "with", Stop(), quiet, Skip(), sigma=1e9)
    module = toy_training(ema=0.9)
    module.objectives["poison"] = quiet
    data = Toy()
    data.setup()
    toy_trainer(tmp_path / "without").fit(module, datamodule=data)
    assert digest(with_guard) == digest(module)


def test_its_memory_goes_into_the_checkpoint():
    guard, again = (Guard("a", "b", Stop(), Warn(), window=5) for _ in "ab")
    guard._losses.extend([1.0, 2.0])
    guard._norms.extend([3.0, 4.0])
    guard.rolled_back = 2
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict()


# ---------------------------------------------------------------------- where it comes from


def losses_of(model, batch):
    return Classes("answer", "label")(model, model.encode(batch), batch)


def found_in(batch, change=None):
    model = small_model()
    if change is not None:
        with torch.no_grad():
            change(model)
    return diagnose(model, lambda b: losses_of(model, b), batch, seed=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_input_that_is_not_finite_is_named_with_its_modality(value):
    batch = random_batch()
    row, item = list(batch.inputs["audio"].items())[2]
    item[-1, 0] = value
    found = found_in(batch)
    assert found.rows == [batch.ids[row]]
    assert found.inputs == {"audio": [batch.ids[row]]}
    assert found.module.startswith("encoders.audio")


def test_a_weight_that_is_not_finite_is_named_and_no_row():
    found = found_in(random_batch(), lambda model: model.heads["answer"].out.weight[0, 0].fill_(math.nan))
    assert found.rows == []
    assert found.weights == ["heads.answer.out.weight"]
    assert found.module == "heads.answer.out"


def test_rows_that_are_bad_only_together_are_named_together():
    model, batch = small_model(), random_batch()

    def losses(part):
        both = {"row-2", "row-9"} <= set(part.ids)
        return {"pair": next(model.parameters()).sum() * (math.nan if both else 1.0)}

    assert {"row-2", "row-9"} <= set(diagnose(model, losses, batch, seed=0).rows)


def test_a_sound_batch_has_nothing_to_name():
    found = found_in(random_batch())
    assert (found.rows, found.inputs, found.weights, found.gradients, found.module) == ([], {}, [], [], None)


def test_a_batch_comes_back_from_its_file(tmp_path):
    batch = random_batch()
    torch.save(to_plain(batch), tmp_path / "batch.pt")
    again = from_plain(torch.load(tmp_path / "batch.pt", weights_only=True))
    assert again.ids == batch.ids
    for name, part in batch.inputs.items():
        assert torch.equal(again.inputs[name].values, part.values)
        assert (again.inputs[name].shapes, again.inputs[name].rows) == (part.shapes, part.rows)
