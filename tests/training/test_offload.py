"""Optimizers with their state elsewhere or in fewer bits: the same run, also when it goes on."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from mmformer.training.loggers import MetricsCSV
from mmformer.training.offload import Offloaded
from mmformer.training.optim import adamw, adamw_8bit, offloaded_adamw, parameter_groups
from tests.training.toy import Toy, digest, toy_trainer, toy_training

SETTINGS = {"lr": 1e-2, "weight_decay": 0.05, "betas": (0.9, 0.98), "layer_decay": 0.7}


def offloaded(module: nn.Module) -> Offloaded:
    groups = parameter_groups(module, 1e-2, 0.05, 0.7)
    return Offloaded(groups, partial(AdamW, lr=1e-2, betas=(0.9, 0.98), fused=True))


def fit(folder, optimizer, steps=9, checkpoint=None):
    data, module = Toy(), toy_training(ema=0.9)
    data.setup()
    module.make_optimizer = optimizer
    trainer = toy_trainer(folder, steps, accumulate=2, limit_val_batches=0, every_n_steps=2)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module, trainer


def test_an_offloaded_optimizer_makes_the_run_of_the_one_within(tmp_path):
    found, trainer = fit(tmp_path / "away", offloaded)
    expected, _ = fit(tmp_path / "here", partial(adamw, **SETTINGS))
    assert digest(found) == digest(expected)
    assert len(trainer.optimizers[0].param_groups) > 2
    assert not trainer.optimizers[0].state
    saved = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("away", "here")]
    states = [s["optimizer_states"][0]["state"] for s in saved]
    for own, other in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(own[name], other[name]) for name in other)


@pytest.mark.parametrize("away_first", [True, False])
def test_an_offloaded_optimizer_goes_on_from_a_checkpoint_of_either_kind(tmp_path, away_first):
    first, second = (offloaded, partial(adamw, **SETTINGS))[:: 1 if away_first else -1]
    whole, _ = fit(tmp_path / "whole", first)
    fit(tmp_path / "part", first, 4)
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    # the schedule ends elsewhere for a shorter run, so the rest is compared with one that was cut alike
    resumed, _ = fit(tmp_path / "again", first, 9, last)
    other, _ = fit(tmp_path / "other", second, 9, last)
    assert digest(resumed) == digest(other)
    assert digest(resumed) != digest(whole)


def test_a_step_of_a_schedule_and_a_step_without_gradients_reach_the_copies():
    model = nn.Linear(3, 2)
    optimizer = Offloaded([{"params": list(model.parameters())}], partial(torch.optim.SGD, lr=1.0))
    before = model.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight, before)
    optimizer.param_groups[0]["lr"] = 0.5
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert torch.equal(model.weight, before - 0.5)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5


def test_a_model_on_the_cpu_has_nothing_to_offload():
    with pytest.raises(ValueError, match="this model is on the CPU, where they lie anyway"):
        offloaded_adamw(nn.Linear(2, 2), **SETTINGS)


@pytest.fixture
def torchao():
    found = pytest.importorskip("torchao.optim", reason="moments of 8 bits are torchao's")
    with torch.compiler.set_stance("force_eager"):  # its step is compiled otherwise, for a minute
        yield found


class Wide(nn.Module):
    """Large enough for moments of 8 bits, but for its biases."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))

    def loss(self, seed):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        return (self.maps(x) - x.roll(1, 1)).square().mean()


def train(module, optimizer, seeds):
    losses = []
    for seed in seeds:
        optimizer.zero_grad()
        losses.append(module.loss(seed))
        losses[-1].backward()
        optimizer.step()
    return [loss.item() for loss in losses]


def test_moments_of_8_bits_take_a_quarter_and_train_alike(torchao):
    torch.manual_seed(1)
    exact, module = Wide(), Wide()
    module.load_state_dict(exact.state_dict())
    plain, small = adamw(exact, **SETTINGS), adamw_8bit(module, **SETTINGS)
    assert train(module, small, range(20)) == pytest.approx(train(exact, plain, range(20)), rel=0.02)
    moment = small.state[module.maps[0].weight]["exp_avg"]
    assert moment.codes.dtype == torch.uint8
    assert sum(t.nbytes for t in (moment.codes, moment.scale)) < 0.27 * 4 * module.maps[0].weight.numel()


def test_moments_of_8_bits_are_saved_as_plain_tensors_and_go_on_bit_by_bit(torchao, tmp_path):
    torch.manual_seed(1)
    whole, part = Wide(), Wide()
    part.load_state_dict(whole.state_dict())
    expected = train(whole, adamw_8bit(whole, **SETTINGS), range(8))
    first = adamw_8bit(part, **SETTINGS)
    train(part, first, range(4))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    types = {type(value) for own in first.state_dict()["state"].values() for value in own.values()}
    assert types <= {torch.Tensor, dict}
    second = adamw_8bit(part, **SETTINGS)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert train(part, second, range(4, 8)) == expected[4:]


def test_a_run_with_moments_of_8_bits_follows_its_schedule_and_goes_on(torchao, tmp_path):
    make = partial(adamw_8bit, **SETTINGS)
    whole, trainer = fit(tmp_path / "whole", make)
    assert float(trainer.optimizers[0].param_groups[0]["lr"]) < 1e-3
    expected, _ = fit(tmp_path / "plain", partial(adamw, **SETTINGS))
    rates = [
        [row["lr"] for row in MetricsCSV(str(tmp_path / name / "metrics.csv"))._read()] for name in ("whole", "plain")
    ]
    assert [float(rate) for rate in rates[0]] == pytest.approx([float(rate) for rate in rates[1]], rel=1e-5)
    apart, travelled = _distance(whole, expected), _distance(expected, fit(tmp_path / "start", make, 1)[0])
    assert apart < 0.1 * travelled
    states = []
    for name in ("first", "second"):
        fit(tmp_path / name, make, 4)
        states.append(digest(fit(tmp_path / name, make, 9, tmp_path / name / "checkpoints" / "last.ckpt")[0]))
    assert states[0] == states[1]


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmformer\[mobile\]'"):
        adamw_8bit(nn.Linear(2, 2), **SETTINGS)


def _distance(one, other) -> float:
    """Of two models' weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return torch.stack([(a - b).square().sum() for a, b in pairs]).sum().sqrt().item()
