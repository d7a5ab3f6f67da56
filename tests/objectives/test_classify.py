import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics

from mmformer.batch import Batch
from mmformer.heads import Head
from mmformer.model import Encoded
from mmformer.objectives import Classes, Labels, Number
from tests.helpers import random_batch, scramble, small_model


def setup(size=14):
    model, batch = small_model(), random_batch(size)
    return model, model.encode(batch), batch


def with_targets(batch, **targets):
    return Batch(ids=batch.ids, inputs=batch.inputs, targets=targets, indices=batch.indices)


def test_classes_is_cross_entropy_over_those_that_have_a_target():
    model, encoded, batch = setup()
    target = batch.targets["label"].clone()
    target[[1, 4]] = -100
    loss = Classes("answer", "label")(model, encoded, with_targets(batch, label=target))["loss"]
    logits = model.output(encoded, "answer")[0]
    expected = F.cross_entropy(logits[target >= 0], target[target >= 0])
    torch.testing.assert_close(loss, expected)


def test_a_source_counts_only_samples_that_have_it():
    model, encoded, batch = setup()
    loss = Classes("answer", "label", source="image")(model, encoded, batch)["loss"]
    rows = sorted(batch.inputs["image"].rows)
    logits = model.output(encoded, "answer", "image")[0]
    torch.testing.assert_close(loss, F.cross_entropy(logits[rows], batch.targets["label"][rows]))


def test_no_target_at_all_gives_a_zero_loss_with_a_gradient():
    model, encoded, batch = setup(3)
    batch = with_targets(batch, label=torch.full((3,), -100))
    loss = Classes("answer", "label")(model, encoded, batch)["loss"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


def test_a_source_nobody_has_is_absent_not_an_error():
    model, encoded, batch = setup()
    encoded = Encoded({"text": encoded["text"]}, len(batch))
    prediction = Classes("answer", "label", source="image").predict(model, encoded, batch)
    assert not prediction["present"].any()


def test_class_meter_agrees_with_scikit_learn():
    objective, batch = Classes("answer", "label"), random_batch(40)
    logits = torch.randn(40, 7)
    meter = objective.meter()
    for rows in (range(0, 13), range(13, 40)):
        part = batch.select(list(rows))
        meter.update({"logits": logits[list(rows)], "present": torch.ones(len(part)).bool()}, part)
    got, wanted, said = meter.compute(), batch.targets["label"], logits.argmax(1)
    assert got["acc"] == pytest.approx(metrics.accuracy_score(wanted, said))
    assert got["f1"] == pytest.approx(metrics.f1_score(wanted, said, average="macro"))


def test_labels_ignore_unknown_ones_and_their_meter_agrees_with_scikit_learn():
    model, encoded, batch = setup()
    target = (torch.rand(14, 7) > 0.6).float()
    target[3, 2] = torch.nan
    batch = with_targets(batch, tags=target)
    objective = Labels("answer", "tags")
    logits = objective.predict(model, encoded, batch)["logits"]
    known = ~target.isnan()
    torch.testing.assert_close(
        objective(model, encoded, batch)["loss"], F.binary_cross_entropy_with_logits(logits[known], target[known])
    )
    meter = objective.meter()
    meter.update(objective.predict(model, encoded, batch), batch)
    got = meter.compute()
    per_class = [
        metrics.average_precision_score(target[known[:, c], c], logits[known[:, c], c].detach()) for c in range(7)
    ]
    assert got["map"] == pytest.approx(sum(per_class) / 7)
    assert got["f1"] == pytest.approx(metrics.f1_score(target[known], logits[known] > 0))


def test_number_is_squared_error_on_the_standard_scale_and_predicts_on_the_real_one():
    model, encoded, batch = setup()
    target = torch.randn(14) * 50 + 100
    target[2] = torch.nan
    batch = with_targets(batch, price=target)
    model.heads["price"] = scramble(Head(24, 1, mean=100.0, std=50.0))
    objective = Number("price", "price")
    value = objective.predict(model, encoded, batch)["value"]
    known = ~target.isnan()
    expected = (((value - target)[known]) / 50).square().mean()
    torch.testing.assert_close(objective(model, encoded, batch)["loss"], expected, rtol=1e-4, atol=1e-5)
    meter = objective.meter()
    meter.update({k: v.detach() for k, v in objective.predict(model, encoded, batch).items()}, batch)
    got = meter.compute()
    assert got["mae"] == pytest.approx(metrics.mean_absolute_error(target[known], value[known].detach()), rel=1e-4)
    assert got["r2"] == pytest.approx(metrics.r2_score(target[known], value[known].detach()), rel=1e-3)


def test_empty_meters_say_nothing():
    for objective in (Classes("answer", "x"), Labels("answer", "x"), Number("answer", "x")):
        assert objective.meter().compute() == {}
