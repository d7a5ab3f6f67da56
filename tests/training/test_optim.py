"""Parameter groups, schedules and the average of weights."""

import math

import pytest
import torch
from torch import nn

from mmformer.training.optim import Average, adamw, parameter_groups, total_steps, warmup_cosine
from tests.training.toy import toy_model


def test_every_trainable_parameter_is_in_one_group_and_vectors_do_not_decay():
    model = toy_model()
    model.freeze(["encoders.image.*"])
    decayed, kept = parameter_groups(model, 1e-3, 0.1, 1.0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in (*decayed["params"], *kept["params"])} == {id(p) for p in trainable}
    assert len(decayed["params"]) + len(kept["params"]) == len(trainable)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert model.fusion is not None
    assert any(p is model.fusion.latents for p in kept["params"])
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_tied_weights_are_stepped_once():
    first = nn.Linear(4, 4)
    tied = nn.ModuleList([first, nn.Linear(4, 4)])
    tied[1].weight = first.weight
    assert sum(len(group["params"]) for group in parameter_groups(tied, 1e-3, 0.1, 1.0)) == 3


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="everything is frozen"):
        adamw(nn.Linear(2, 2).requires_grad_(False), lr=1.0, weight_decay=0.0, betas=[0.9, 0.99], layer_decay=1.0)


@pytest.mark.parametrize("warmup", [0.2, 20.0])
def test_the_rate_rises_then_falls_to_the_floor(warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, 100, warmup=warmup, floor=0.1)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(2.0 / 20)
    assert rates[19] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert rates[100] == pytest.approx(0.2)


def test_a_run_ends_at_what_comes_first_and_must_end():
    assert total_steps(100, 3, 20) == 60
    assert total_steps(50, 3, 20) == 50
    assert total_steps(-1, 3, 20) == 60
    with pytest.raises(ValueError, match=r"set trainer\.max_steps or trainer\.max_epochs"):
        total_steps(-1, -1, 20)


def test_the_average_is_the_recursion_written_out():
    module = nn.Linear(3, 2)
    average = Average(module, 0.5)
    expected = module.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3))
        decay = min(0.5, step / (step + 9))
        expected = decay * expected + (1 - decay) * module.weight.detach()
        average.update(module, step)
    torch.testing.assert_close(average.module.weight, expected)
    assert not any(p.requires_grad for p in average.parameters())
    assert not average.train().module.training


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_an_average_of_all_or_nothing_is_refused(decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Average(nn.Linear(1, 1), decay)
