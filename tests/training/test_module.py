"""The training step and the evaluation, on a tiny run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmformer.batch import Batch
from mmformer.objectives.objective import Objective
from mmformer.training.data_errors import BadDataError
from mmformer.training.evaluation import letters, subsets
from mmformer.training.loggers import MetricsCSV
from mmformer.training.module import NonFiniteLoss, Training
from tests.training.toy import Toy, ToySplit, toy_trainer, toy_training


def fit(folder, module=None, data=None, **options):
    data = data or Toy()
    data.setup()
    module = module or toy_training()
    trainer = toy_trainer(folder, **options)
    trainer.fit(module, datamodule=data)
    return module, trainer, data


def test_letters_are_in_the_order_text_image_audio_and_differ():
    assert letters(["audio", "image", "text"]) == {"text": "t", "image": "i", "audio": "a"}
    assert letters(["tactile", "text"]) == {"text": "t", "tactile": "a"}
    assert list(subsets(["audio", "text", "image"])) == ["t", "i", "a", "ti", "ta", "ia", "tia"]


def test_the_metric_of_a_subset_is_that_of_a_data_set_of_that_subset(tmp_path):
    module, trainer, data = fit(tmp_path)
    trainer.test(module, datamodule=data, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"test/acc", "test/acc_t", "test/acc_i", "test/acc_ti", "test/loss"} <= set(found)
    batch = data.splits["test"].__getitems__([(0, i) for i in range(20)])
    module.eval()
    for letter, names in {"t": ["text"], "i": ["image"], "ti": ["text", "image"]}.items():
        rows = [row for row, have in enumerate(batch.present()) if have.issuperset(names)]
        alone = batch.select(rows).only(names)
        with torch.no_grad():
            logits, _ = module.model.output(module.model.encode(alone), "answer")
        right = (logits.argmax(-1) == alone.targets["label"]).double().mean()
        assert found[f"test/acc_{letter}"] == pytest.approx(float(right))
        assert len(rows) < 20


class Explosive(Objective):
    """A loss that is NaN for one row."""

    def forward(self, model, encoded, batch: Batch):
        bad = float("nan") if "row-13" in batch.ids else 0.0
        return {"loss": next(model.parameters()).sum() * bad}


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_rows(tmp_path):
    module = toy_training()
    module.objectives["explosive"] = Explosive()
    with pytest.raises(NonFiniteLoss, match=r"explosive.*row-13") as caught:
        fit(tmp_path, module)
    assert "not updated" in str(caught.value)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


class Bare(Toy):
    """No row of the training split can be read."""

    def setup(self, stage=None):
        super().setup(stage)
        self.splits["train"] = ToySplit(16, True, broken=frozenset(range(16)))


def test_batches_without_a_sample_change_nothing_and_break_nothing(tmp_path):
    module = toy_training()
    before = {name: p.clone() for name, p in module.named_parameters()}
    for group in (1e9,):
        fit(tmp_path, module, Bare(), steps=3, max_bad_fraction=group)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:  # the others decay
            assert torch.equal(parameter, before[name])


def test_every_unreadable_row_is_listed_once(tmp_path):
    fit(tmp_path, data=Toy(broken=frozenset({3, 7})), steps=12)
    lines = (tmp_path / "data_errors.jsonl").read_text().splitlines()
    assert sorted(lines) == [
        f'{{"id": "row-{i}", "column": "image", "path": "{i}.png", "reason": "is broken"}}' for i in (3, 7)
    ]


def test_too_many_unreadable_rows_stop_the_run(tmp_path):
    with pytest.raises(BadDataError, match=r"12 of 84 rows could not be read.*12\.png|of 84 rows"):
        fit(tmp_path, data=Toy(broken=frozenset(range(12))))


def test_the_average_is_what_is_judged_and_it_lags(tmp_path):
    module, *_ = fit(tmp_path, toy_training(ema=0.9))
    judged, objectives = module.evaluated()
    assert judged is not module.model
    assert not judged.training
    assert "answer" in objectives
    different = [not torch.equal(a, b) for a, b in zip(judged.parameters(), module.model.parameters(), strict=True)]
    assert any(different)


def test_only_what_is_not_frozen_moves(tmp_path):
    module = toy_training()
    module.model.freeze(["encoders.image.*"])
    before = {name: p.clone() for name, p in module.model.named_parameters()}
    fit(tmp_path, module, steps=3)
    moved = {name for name, p in module.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert not any(name.startswith("encoders.image") for name in moved)


def test_a_run_that_goes_on_with_more_csv_files_takes_back_the_rows_of_its_own(tmp_path):
    fit(tmp_path, steps=6)  # last.ckpt holds 6 rows and a validation
    last = tmp_path / "checkpoints" / "last.ckpt"
    rows = len(MetricsCSV(str(tmp_path / "metrics.csv"))._read())
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("99,99\n")  # of a step that was lost
    module, data = toy_training(), Toy()
    data.setup()
    trainer = toy_trainer(tmp_path, steps=8)
    trainer.loggers = [MetricsCSV(str(tmp_path / "second.csv")), *trainer.loggers]
    trainer.fit(module, datamodule=data, ckpt_path=last)
    own, second = (MetricsCSV(str(tmp_path / name))._read() for name in ("metrics.csv", "second.csv"))
    assert [row["step"] for row in own if "train/loss" in row] == [str(step) for step in range(1, 9)]
    assert len(own) > rows
    assert [row["step"] for row in second if "train/loss" in row] == ["7", "8"]


def test_two_batches_accumulated_log_their_mean(tmp_path):
    fit(tmp_path, steps=2, accumulate=2)
    rows = MetricsCSV(str(tmp_path / "metrics.csv"))._read()
    assert [row["step"] for row in rows if "train/loss" in row] == ["1", "2"]


def test_objectives_are_weighted_and_a_weight_without_one_is_refused():
    make = toy_training
    base = make()
    with pytest.raises(ValueError, match=r"weights for \['picture'\], but the objectives are \['answer'\]"):
        Training(
            base.model,
            dict(base.objectives.items()),
            {"picture": 1.0},
            base.make_optimizer,
            base.make_schedule,
            0,
            None,
        )
    batch = ToySplit(8, False).__getitems__([(0, i) for i in range(8)])
    double = Training(
        base.model, dict(base.objectives.items()), {"answer": 2.0}, base.make_optimizer, base.make_schedule, 0, None
    )
    base.eval()
    encoded = base.model.encode(batch)
    one = base._losses(base.model, dict(base.objectives.items()), encoded, batch)["answer"]
    two = double._losses(base.model, dict(base.objectives.items()), encoded, batch)["answer"]
    assert math.isclose(2 * one.item(), two.item(), rel_tol=1e-6)
    assert isinstance(base.objectives, nn.ModuleDict)
