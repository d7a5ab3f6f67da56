"""The weights of several objectives, and that they go on as they were when a run is resumed."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmformer.objectives import Classes
from mmformer.training.checkpointing import load_whole
from mmformer.training.module import Training
from mmformer.training.weighting import Ramp, Uncertainty, Weighting
from tests.training.toy import Toy, digest, toy_trainer, toy_training


def test_a_ramp_goes_straight_and_stays() -> None:
    up, down = Ramp(start=0.0, stop=0.4, steps=4), Ramp(start=1.0, stop=0.0, steps=2, after=3)
    assert [up(step) for step in (0, 1, 2, 4, 9)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert [down(step) for step in (0, 3, 4, 5, 9)] == [1, 1, 0.5, 0, 0]


def test_each_objective_has_its_own_weight_and_1_without_one() -> None:
    losses = {"loss": torch.tensor(3.0), "other": torch.tensor(5.0)}
    weighting = Weighting({"a": 2, "b": Ramp(start=0.0, stop=1.0, steps=10)}, ["a", "b", "c"])
    found = {name: weighting(name, losses, step=5) for name in "abc"}
    assert {k: float(v) for k, v in found["a"].items()} == {"loss": 6.0, "other": 10.0}
    assert float(found["b"]["loss"]) == 1.5
    assert float(found["c"]["loss"]) == 3.0


@pytest.mark.parametrize("squared", [False, True])
def test_uncertainty_is_the_likelihood_of_the_paper_and_settles_at_the_loss(squared: bool) -> None:
    learned = Uncertainty(variance=4.0, squared=squared)
    weighting = Weighting({"a": learned}, ["a"])
    loss = torch.tensor(3.0)
    total = torch.stack([*weighting("a", {"loss": loss}, 0).values()]).sum()
    assert total.item() == pytest.approx(3 / (2 * 4 if squared else 4) + math.log(2))  # log of the deviation
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        torch.stack([*weighting("a", {"loss": loss}, 0).values()]).sum().backward()
        optimizer.step()
    assert learned.log_variance.exp().item() == pytest.approx(3.0 if squared else 6.0, rel=1e-3)
    assert weighting("a", {}, 0) == {}


def weighted() -> Training:
    base = toy_training()
    weights = {"answer": Uncertainty(0.5), "again": Ramp(start=0.0, stop=1.0, steps=9)}
    objectives = {name: Classes("answer", "label") for name in weights}
    return Training(base.model, objectives, weights, base.make_optimizer, steady, seed=5, ema=0.9)


def steady(optimizer: Optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1.0)


def test_weights_are_learned_saved_and_go_on_bit_for_bit(tmp_path) -> None:
    def run(name: str, steps: int, checkpoint=None) -> Training:
        data, module = Toy(), weighted()
        data.setup()
        toy_trainer(tmp_path / name, steps=steps).fit(module, datamodule=data, ckpt_path=checkpoint)
        return module

    torch.manual_seed(7)
    whole = run("whole", 6)
    run("first", 3)
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    assert "weighting.learned.answer.log_variance" in load_whole(last)["state_dict"]
    resumed = run("second", 6, last)
    assert digest(resumed) == digest(whole)
    learned = whole.weighting.learned["answer"]
    assert isinstance(learned, Uncertainty)
    assert learned.log_variance.item() != pytest.approx(math.log(0.5), abs=1e-4)
