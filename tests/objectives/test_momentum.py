import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from mmformer.objectives import Momentum, MomentumContrastive
from mmformer.objectives.momentum import Taught
from mmformer.objectives.space import Space
from tests.helpers import random_batch, scramble
from tests.objectives.alignment import SPACE, cross_model

PAIR = ["text", "image"]
BOTH = (("text", "image"),)


def prepared(model, modalities=PAIR, queue=0, weight=0.4, ramp=0, decay=0.9, temperature=0.07, same=None):
    momentum, contrastive = (
        Momentum(decay, weight, ramp),
        MomentumContrastive(modalities, SPACE, queue, temperature, same),
    )
    for objective in (momentum, contrastive):
        objective.prepare(model)
    return momentum, contrastive


def losses(model, objectives, batch):
    encoded, found = model.encode(batch), {}
    for objective in objectives:
        found |= objective(model, encoded, batch)
    return found, encoded


def embedded(model, batch, names=PAIR):
    encoded = model.encode(batch)
    return {name: model.output(encoded, name, name)[0] for name in names}


def loop(student, teacher, queues, temperature, weight):
    """ALBEF's contrastive loss in plain loops: `student` and `teacher` are {modality: rows}."""
    total = 0.0
    for one, other in (PAIR, PAIR[::-1]):
        keys = [*teacher[other].tolist(), *queues[other].tolist()]
        for i, (row, told) in enumerate(zip(student[one].tolist(), teacher[one].tolist(), strict=True)):
            said = [math.exp(sum(a * b for a, b in zip(row, key, strict=True)) / temperature) for key in keys]
            soft = [math.exp(sum(a * b for a, b in zip(told, key, strict=True)) / temperature) for key in keys]
            for j in range(len(keys)):
                target = weight * soft[j] / sum(soft) + (1 - weight) * (i == j)
                total -= target * math.log(said[j] / sum(said))
    return total / (2 * len(student["text"]))


@pytest.mark.parametrize("weight", [0.0, 0.4])
@pytest.mark.parametrize("queue", [0, 5])
def test_it_is_the_loop_of_the_paper(weight, queue):
    model, batch = cross_model().double(), random_batch(6, subsets=BOTH)
    objectives = prepared(model, queue=queue, weight=weight)
    objectives[1].double()
    scramble(objectives[0].model, seed=5)
    found, _ = losses(model, objectives, batch)
    with torch.no_grad():
        student, teacher = embedded(model, batch), embedded(objectives[0].model, batch)
    none = {name: torch.zeros(0, SPACE) for name in PAIR}
    queues = {name: q.rows for name, q in objectives[1].queues.items()} if queue else none
    assert float(found["text_image"].detach()) == pytest.approx(loop(student, teacher, queues, 0.07, weight), rel=1e-6)


def test_without_queue_and_weight_a_teacher_equal_to_the_model_gives_open_clips_loss():
    open_clip = pytest.importorskip("open_clip", reason="the oracle of the contrastive loss")
    model, batch = cross_model(), random_batch(8, subsets=BOTH)
    objectives = prepared(model, weight=0.0)
    found, _ = losses(model, objectives, batch)
    found["text_image"].backward()
    ours = [p.grad.clone() for p in model.heads["text"].parameters()]
    model.zero_grad()
    rows, scale = embedded(model, batch), torch.tensor(1 / 0.07)
    theirs = open_clip.loss.ClipLoss()
    torch.testing.assert_close(found["text_image"], theirs(rows["image"], rows["text"], scale), rtol=1e-6, atol=0)
    # the keys are the teacher's: of their loss only what flows through the rows that ask
    fixed = {name: vectors.detach() for name, vectors in rows.items()}
    logits = [scale * rows[one] @ fixed[other].T for one, other in (PAIR, PAIR[::-1])]
    sum(F.cross_entropy(part, torch.arange(8)) / 2 for part in logits).backward()
    for one, other in zip(ours, [p.grad for p in model.heads["text"].parameters()], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_gradients_are_those_of_the_whole_expression_and_none_reaches_the_teacher():
    model, batch = cross_model(), random_batch(6, subsets=BOTH)
    objectives = prepared(model, queue=5)
    scramble(objectives[0].model, seed=5)
    found, _ = losses(model, objectives, batch)
    found["text_image"].backward()
    assert all(p.grad is None for p in objectives[0].parameters())
    head, scale = model.heads["text"].out.weight, objectives[1].log_scale
    ours = [head.grad.clone(), scale.grad.clone()]
    head.grad = None
    rows, log_scale = embedded(model, batch), scale.detach().clone().requires_grad_()
    with torch.no_grad():
        taught = embedded(objectives[0].model, batch)
        keys = {name: torch.cat([taught[name], objectives[1].queues[name].rows]) for name in PAIR}
    total = torch.zeros(())
    for one, other in (PAIR, PAIR[::-1]):
        target = 0.4 * (taught[one] @ keys[other].T / 0.07).softmax(1) + 0.6 * F.one_hot(torch.arange(6), 11)
        total = total - (target * (log_scale.exp() * rows[one] @ keys[other].T).log_softmax(1)).sum() / 12
    total.backward()
    for got, wanted in zip(ours, [head.grad, log_scale.grad], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_samples_of_one_id_are_positives_in_the_batch_and_in_the_queue():
    model, batch = cross_model(), random_batch(4, subsets=BOTH)
    batch.targets["icon"] = torch.tensor([3, 8, 3, -100])
    objectives = prepared(model, queue=3, weight=0.0, same="icon")
    contrastive = objectives[1]
    for queue in contrastive.queues.values():
        queue.ids.copy_(torch.tensor([8, -100, 3]))
    found, _ = losses(model, objectives, batch)
    rows = embedded(model, batch)
    positive = torch.tensor(
        [[1, 0, 1, 0, 0, 0, 1], [0, 1, 0, 0, 1, 0, 0], [1, 0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0, 0]]
    )
    target, total = positive / positive.sum(1, keepdim=True), torch.zeros(())
    for one, other in (PAIR, PAIR[::-1]):
        keys = torch.cat([rows[other], contrastive.queues[other].rows])
        total = total - (target * (rows[one] @ keys.T / 0.07).log_softmax(1)).sum() / 8
    torch.testing.assert_close(found["text_image"], total, rtol=1e-5, atol=1e-6)


def test_every_pair_of_modalities_counts_over_the_samples_that_have_both():
    model, batch = cross_model(), random_batch(21)
    names = ["text", "image", "audio"]
    objectives = prepared(model, names, queue=4)
    found, encoded = losses(model, objectives, batch)
    assert set(found) == {"text_image", "text_audio", "image_audio"}
    part = prepared(model, ["text", "audio"], queue=4)
    alone, _ = losses(model, part, batch.only(["text", "audio"]))
    torch.testing.assert_close(found["text_audio"], alone["text_audio"] / 3)
    space = encoded.shared[Space]
    assert set(space.rows) == set(space.keys) == set(names)
    assert not any(vectors.requires_grad for vectors in (*space.rows.values(), *space.keys.values(), space.scale))


def test_the_teacher_moves_once_for_each_step_whatever_the_micro_batches():
    model = cross_model()
    momentum, contrastive = prepared(model, queue=7, decay=0.75)
    before, start = deepcopy(momentum.model), contrastive.queues["text"].rows.clone()
    for seed in (1, 2):
        losses(model, (momentum, contrastive), random_batch(2, seed, subsets=BOTH))
    assert torch.equal(contrastive.queues["text"].rows, start)
    scramble(model, seed=3)
    taught = torch.cat([embedded(before, random_batch(2, seed, subsets=BOTH))["text"] for seed in (1, 2)])
    for objective in (momentum, contrastive):
        objective.advance(model)
    torch.testing.assert_close(contrastive.queues["text"].rows, torch.cat([taught, start[4:]]))
    for ours, old, new in zip(momentum.model.parameters(), before.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, 0.75 * old + 0.25 * new)
    contrastive.advance(model)
    assert int(contrastive.queues["text"].next) == 4


def test_nothing_is_put_aside_in_evaluation():
    model = cross_model()
    objectives = prepared(model, queue=5)
    start = objectives[1].queues["text"].rows.clone()
    objectives[1].eval()
    losses(model, objectives, random_batch(4, subsets=BOTH))
    objectives[1].advance(model)
    assert torch.equal(objectives[1].queues["text"].rows, start)


def test_the_weight_of_the_teacher_grows_with_the_steps():
    model, batch = cross_model(), random_batch(4, subsets=BOTH)
    momentum, _ = prepared(model, weight=0.4, ramp=4)
    weights = []
    for _ in range(6):
        encoded = model.encode(batch)
        momentum(model, encoded, batch)
        weights.append(float(encoded.shared[Taught].weight))
        momentum.advance(model)
    assert weights == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_the_teacher_rests_and_shares_what_is_frozen_for_good():
    model = cross_model()
    model.freeze(["encoders.image.*"])
    model.encoders.register_buffer("seen", torch.zeros(2))
    momentum, _ = prepared(model)
    assert not momentum.train().model.training
    theirs = dict(momentum.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (theirs[name] is parameter) == name.startswith("encoders.image.")
        assert not theirs[name].requires_grad
    model.encoders.seen += 3
    momentum.advance(model)
    assert momentum.model.encoders.seen.tolist() == [3, 3]


def test_the_temperature_stays_between_its_bounds():
    model = cross_model()
    _, contrastive = prepared(model)
    for raw, wanted in ((100.0, 0.001), (-100.0, 0.5)):
        contrastive.log_scale.data.fill_(raw)
        contrastive.advance(model)
        assert float((-contrastive.log_scale).detach().exp()) == pytest.approx(wanted)


def test_what_only_training_needs_is_not_exported():
    objectives = prepared(cross_model(), queue=5)
    states = [set(objective.exported().state_dict()) for objective in objectives]
    assert states == [{"step"}, {"log_scale"}]
    assert any(name.startswith("model.") for name in objectives[0].state_dict())
    assert "queues.text.rows" in objectives[1].state_dict()
    assert set(Momentum(0.9, 0.4, 1).state_dict()) == {"step"}


def test_mistakes_are_named():
    model, batch = cross_model(), random_batch(4, subsets=BOTH)
    with pytest.raises(ValueError, match="put the objective `momentum` in front"):
        MomentumContrastive(PAIR, SPACE, 0, 0.07)(model, model.encode(batch), batch)
    with pytest.raises(ValueError, match="call prepare"):
        Momentum(0.9, 0.4, 0)(model, model.encode(batch), batch)
    with pytest.raises(ValueError, match="at least two"):
        MomentumContrastive(["text"], SPACE, 0, 0.07)
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        Momentum(1.5, 0.4, 0)
    objectives = prepared(model, same="icon")
    with pytest.raises(KeyError, match="no target 'icon'"):
        losses(model, objectives, batch)
