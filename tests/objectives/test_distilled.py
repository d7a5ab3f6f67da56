import pytest
import torch
import torch.nn.functional as F

from mmformer.model import Encoded
from mmformer.objectives import DistilledWords, Momentum
from mmformer.objectives.masked import Words
from mmformer.objectives.momentum import Taught
from mmformer.tokens import to_padded
from tests.helpers import random_batch, scramble
from tests.objectives.alignment import WORDS, cross_model

HIDDEN = 49


def words(share=0.4):
    return DistilledWords(Words("vocabulary", HIDDEN, WORDS, [HIDDEN], share), ["text", "image"])


def taught(model, batch, weight=0.4):
    momentum = Momentum(0.9, weight, 0)
    momentum.prepare(model)
    scramble(momentum.model, seed=5)
    encoded = model.encode(batch)
    momentum(model, encoded, batch)
    return momentum.model, encoded


def one_by_one(model, batch, rows, shown, hidden):
    """What a model says in each hidden place, sample by sample."""
    out = []
    for place, row in enumerate(rows):
        encoded = model.encode(batch.select([row]).only(["image"]))
        ids = shown[place]
        items = type(batch.inputs["text"]).stack([ids], [0])
        text = model.encoders["text"](items, 1)
        fused = to_padded(model.fuse(Encoded({"text": text, "image": encoded["image"]}, 1)))
        spoken = fused.x[0][-len(ids) :]  # behind the latent
        out += [model.heads["vocabulary"](spoken[i]) for i in hidden[place]]
    return torch.stack(out)


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_it_is_the_loop_of_the_paper_sample_by_sample(weight):
    model, batch = cross_model(), random_batch(9, subsets=[("text", "image"), ("text",), ("image", "text")])
    teacher, encoded = taught(model, batch, weight)
    objective = words()
    torch.manual_seed(1)
    loss = objective(model, encoded, batch)["loss"]
    rows = [row for row in range(9) if row % 3 != 1]
    items = batch.only(["text"]).select(rows).inputs["text"]
    torch.manual_seed(1)
    riddle = objective.words.hide(model.encoders["text"], items, None)
    chosen, order = set(riddle.cells.tolist()), []
    shown, hidden, answers, start = {}, {}, {}, 0
    for (row, ids), (_, true) in zip(riddle.items.items(), items.items(), strict=True):
        hidden[row] = [i for i in range(len(ids)) if start + i in chosen]
        shown[row], answers[row] = ids, [true[i] for i in hidden[row]]
        order.append(row)
        start += len(ids)
    assert chosen
    wanted = torch.tensor([answer for row in sorted(order) for answer in answers[row]])
    said = one_by_one(model, batch, rows, shown, hidden)
    with torch.no_grad():
        told = one_by_one(teacher, batch, rows, shown, hidden)
    soft = -(told.softmax(1) * said.log_softmax(1)).sum(1)
    total = ((1 - weight) * F.cross_entropy(said, wanted, reduction="none") + weight * soft).mean()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
    weights = list(model.heads["vocabulary"].parameters())
    for got, want in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(total, weights), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_an_evaluation_hides_the_same_each_time():
    model, batch = cross_model(), random_batch(8, subsets=[("text", "image")])
    _, encoded = taught(model, batch)
    objective = words().eval()
    with torch.no_grad():
        assert torch.equal(objective(model, encoded, batch)["loss"], objective(model, encoded, batch)["loss"])


def test_texts_alone_have_no_part_in_it_and_a_teacher_is_needed():
    model, batch = cross_model(), random_batch(4, subsets=[("text",)])
    _, encoded = taught(model, batch)
    assert words()(model, encoded, batch) == {}
    del encoded.shared[Taught]
    with pytest.raises(ValueError, match="put the objective `momentum` in front"):
        words()(model, encoded, batch)
