"""What is frozen stays as it is and costs nothing; what joins later does so at its step, also in a resumed run."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from mmformer.training.checkpointing import load_whole
from mmformer.training.finetune import Finetune, Schedule, matching
from tests.campaign.kill_resume import Case, forked, straight, train
from tests.test_resume import KillAt
from tests.training.toy import Toy, digest, toy_model, toy_trainer, toy_training

IMAGE = "encoders.image.*"


def finetune(freeze=(IMAGE,), train=(), unfreeze=(), adapters=None) -> Finetune:
    return Finetune(freeze=freeze, train=train, unfreeze=unfreeze, adapters=adapters)


def fit(folder, module, **options):
    data = Toy()
    data.setup()
    trainer = toy_trainer(folder, **options)
    trainer.fit(module, datamodule=data)
    return trainer


class Statistics(nn.Module):
    """A stage with a batch norm and dropout; neither may do anything while it is frozen."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.free = nn.BatchNorm1d(dim, affine=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens):
        return tokens.with_x(self.dropout(self.free(self.norm(tokens.x[0])))[None])


def with_statistics(**options):
    module = toy_training(**options)
    module.model.encoders["image"].stages.append(Statistics(16))
    return module


@pytest.mark.parametrize("ema", [None, 0.9])
def test_what_is_frozen_is_bit_identical_and_in_no_optimizer(tmp_path, ema):
    module = with_statistics(ema=ema, finetune=finetune())
    before = {name: t.clone() for name, t in module.model.state_dict().items()}
    trainer = fit(tmp_path, module, steps=5)
    after = module.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith("encoders.image") for name in changed)
    (optimizer,) = trainer.optimizers
    image = list(module.model.encoders["image"].parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in image}
    assert len(optimizer.state) == len(held) == len([p for p in module.parameters() if p.requires_grad])
    assert all(p.grad is None for p in image)


def test_what_is_frozen_rests_and_what_trains_does_not(tmp_path):
    module = with_statistics(finetune=finetune())
    seen = []
    watch = type("Watch", (Callback,), {"on_train_batch_end": lambda *_: seen.append(_modes(module))})()
    fit(tmp_path, module, steps=7, callbacks=[watch])  # a validation lies in between
    assert len(seen) == 7
    assert all(modes == seen[0] for modes in seen)
    assert not any(mode for name, mode in seen[0].items() if name.startswith("encoders.image"))
    assert seen[0]["fusion.transformer.layers.0.dropout"]


def _modes(module):
    return {name: part.training for name, part in module.model.named_modules()}


def test_the_average_shares_what_is_frozen(tmp_path):
    module = toy_training(ema=0.9, finetune=finetune())
    module.prepare()
    judged, _ = module.evaluated()
    for name, parameter in module.model.named_parameters():
        assert (judged.get_parameter(name) is parameter) == name.startswith("encoders.image")
    fit(tmp_path, module, steps=2)
    assert not torch.equal(judged.get_parameter("heads.answer.out.weight"), module.model.heads["answer"].out.weight)


def test_the_average_starts_from_the_weights_that_were_loaded():
    module = toy_training(ema=0.9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(2.0)
    module.prepare()
    assert all(bool((p == 2).all()) for p in module.evaluated()[0].parameters())


def test_exceptions_train_though_a_pattern_freezes_them():
    model = toy_model()
    schedule = finetune(freeze=["*"], train=["heads.*", "fusion.latents"]).apply(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"heads.answer.out.weight", "heads.answer.out.bias", "fusion.latents"}
    assert schedule.never == {name for name, _ in model.named_parameters()} - trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["encoder.image.*"]}, r"freeze pattern 'encoder.image.\*' matches no .* encoders.image.\*"),
        ({"train": ["head.*"]}, r"train pattern 'head.\*' matches no parameter"),
        ({"freeze": ["*"]}, r"everything is frozen at the first step.*module.finetune.train"),
        ({"unfreeze": [{"step": 3, "patterns": ["heads.*"]}]}, r"unfreeze at step 3: \['heads.\*'\] are not frozen"),
        ({"unfreeze": [{"step": 0, "patterns": [IMAGE]}]}, r"the step above 0"),
        ({"unfreeze": [{"at": 3, "patterns": [IMAGE]}]}, r"write \{step: 500, patterns"),
    ],
)
def test_a_mistake_is_named_with_the_next_step(options, message):
    with pytest.raises(ValueError, match=message):
        toy_training(finetune=finetune(**options)).prepare()


def test_a_tied_parameter_trains_where_one_of_its_names_does():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    model["out"].weight = model["table"].weight
    assert len(matching(model, ["table.*"], "freeze")) == 1
    assert matching(model, ["out.*"], "train") == matching(model, ["table.*"], "freeze")


# ---------------------------------------------------------------------- later


def later(ema=None, layer_decay=0.8):
    """The picture's encoder joins at step 5, the latents at step 9."""
    steps = [{"step": 9, "patterns": ["fusion.latents"]}, {"step": 5, "patterns": [IMAGE]}]
    return toy_training(
        ema, layer_decay=layer_decay, finetune=finetune(freeze=[IMAGE, "fusion.latents"], unfreeze=steps)
    )


def test_a_schedule_is_a_function_of_the_step():
    schedule = Schedule(frozenset({"a"}), ((5, frozenset({"b"})), (9, frozenset({"c"}))))
    assert [schedule.stage(step) for step in (0, 4, 5, 8, 9, 100)] == [0, 0, 1, 1, 2, 2]
    model = nn.ParameterDict({name: torch.zeros(1) for name in "abcd"})
    for stage, expected in enumerate(["d", "bd", "bcd"]):
        schedule.set(model, stage)
        assert "".join(name for name, p in model.named_parameters() if p.requires_grad) == expected


class Watch(Callback):
    """What each step changed, and the rate and moments it was made with."""

    def __init__(self):
        self.first, self.moments, self.rates = {}, {}, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = {name: p.clone() for name, p in module.model.named_parameters()}
        self.rates.append([group["lr"] / group["initial_lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for name, parameter in module.model.named_parameters():
            if not torch.equal(parameter, self.before[name]):
                self.first.setdefault(name, trainer.global_step - 1)
            if parameter in trainer.optimizers[0].state:
                self.moments.setdefault(name, trainer.global_step - 1)


def test_what_joins_later_moves_from_its_step_on_at_the_rate_of_the_schedule(tmp_path):
    module, watch = later(), Watch()
    fit(tmp_path, module, steps=12, callbacks=[watch])
    for name, step in watch.first.items():
        start = 5 if name.startswith("encoders.image") else 9 if name == "fusion.latents" else 0
        assert step == watch.moments[name] == start, name
    assert len(watch.first) == len(list(module.model.parameters()))
    assert all(len(set(map(lambda rate: round(rate, 12), rates))) == 1 for rates in watch.rates)


@pytest.mark.parametrize(
    ("step", "case"),
    [
        (4, Case(make=later)),
        (5, Case(make=later)),  # the last checkpoint is from before, the first step again lies after
        (8, Case(make=later, ema=0.9)),
        (10, Case(make=later, ema=0.9, every_n_steps=1)),
        (6, Case(make=later, accumulate=2, steps=11, every_n_steps=1)),
    ],
)
def test_a_kill_before_or_after_something_joined_changes_nothing(tmp_path, step, case):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    expected, _ = straight(tmp_path / "whole", case)
    kill = KillAt("on_train_batch_start", step).callback()
    assert os.WIFSIGNALED(forked(lambda: train(tmp_path / "killed", case, 0, [kill])))
    assert forked(lambda: train(tmp_path / "killed", case, 0)) == 0
    assert json.loads((tmp_path / "killed" / "result.json").read_text()) == expected


def test_a_checkpoint_from_before_holds_no_moments_of_what_joins_later(tmp_path):
    module = later()
    fit(tmp_path, module, steps=4)
    saved = load_whole(tmp_path / "checkpoints" / "last.ckpt")
    (state,) = saved["optimizer_states"]
    held = sum(len(group["params"]) for group in state["param_groups"])
    assert len(state["state"]) == held - len(list(module.model.encoders["image"].parameters())) - 1


class Digest(Callback):
    """Writes down what each process has in the end."""

    def on_train_end(self, trainer, module):
        parts = {"image": digest(module.model.encoders["image"]), "rest": digest(module)}
        Path(trainer.default_root_dir, f"{trainer.global_rank}.json").write_text(json.dumps(parts))


def test_two_processes_agree_on_what_joined_later(tmp_path, monkeypatch):
    # An earlier test may have looked for a GPU, which a fork could not use; this one uses none.
    monkeypatch.setattr("pytorch_lightning.strategies.launchers.multiprocessing._check_bad_cuda_fork", lambda: None)

    def work():
        torch.set_num_threads(1)
        strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", find_unused_parameters=True)
        with suppress(AttributeError):  # this launcher hands best_model_path back, which our callback knows itself
            fit(tmp_path, later(), steps=8, devices=2, strategy=strategy, callbacks=[Digest()])

    assert forked(work) == 0
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    before = later()
    before.prepare()
    assert one["image"] != digest(before.model.encoders["image"])


def test_a_strategy_that_cannot_unfreeze_says_so():
    module = later()
    module._trainer = SimpleNamespace(strategy=type("FSDPStrategy", (), {})())
    with pytest.raises(ValueError, match=r"unfreeze with FSDPStrategy.* one device or trainer=ddp"):
        module.setup("fit")
