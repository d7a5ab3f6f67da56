from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mmformer.losses.matching import excluded, zeroed
from mmformer.model import Encoded
from mmformer.objectives import Contrastive, Matching, Momentum, MomentumContrastive, info_nce
from mmformer.objectives.matching import gather_tokens
from mmformer.objectives.space import Pairs, Space, embed
from mmformer.tokens import take, to_padded
from tests.helpers import random_batch
from tests.objectives.alignment import SPACE, cross_model
from tests.processes import both

PAIR = ["text", "image"]
BOTH = (("text", "image"),)


def spaced(model, batch, modalities=PAIR, scale=3.0):
    """A batch encoded, with the space of its own vectors beside it."""
    encoded = model.encode(batch)
    rows = embed(model, encoded, modalities)
    encoded.shared[Space] = Space.of(rows, rows, torch.tensor(scale))
    return encoded


def matching(modalities=PAIR, weighting=excluded, top=0, **options):
    return Matching(modalities, "match", weighting, top, **options)


def single(model, batch, text, image):
    """The logits of one pair, made of a batch of two samples: a text and a picture that belong to different ones."""
    part = batch.select([text, image])
    encoded = model.encode(part)
    pair = {"text": take(encoded["text"], [0]), "image": take(encoded["image"], [1])}
    return model.output(Encoded(pair, 1), "match")[0][0]


def test_it_is_the_loop_of_the_paper():
    model, batch = cross_model(), random_batch(5, subsets=BOTH)
    encoded, objective = spaced(model, batch), matching(weighting=zeroed)
    torch.manual_seed(1)
    loss = objective(model, encoded, batch)["text_image"]
    torch.manual_seed(1)
    drawn = objective._draw(encoded.shared[Space], ("text", "image"), Pairs.of(batch, PAIR, None), batch)
    texts, images = drawn["text"], drawn["image"]
    assert texts[:10] == [*range(5)] * 2
    assert images[:5] == images[10:] == [*range(5)]
    assert all(text != image for text, image in zip(texts[5:], images[5:], strict=True))
    total = torch.zeros(())
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        logits = single(model, batch, text, image) if text != image else None
        if logits is None:
            part = batch.select([text])
            logits = model.output(model.encode(part), "match")[0][0]
        total = total + F.cross_entropy(logits[None], torch.tensor([int(i < 5)]))
    torch.testing.assert_close(loss, total / 15, rtol=1e-6, atol=1e-6)
    parameters = [p for name, p in model.named_parameters() if "audio" not in name and name.startswith("fusion")]
    found, wanted = torch.autograd.grad(loss, parameters), torch.autograd.grad(total / 15, parameters)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_the_negatives_are_those_that_the_space_confuses():
    """Over many steps the false pictures of a text come as often as ALBEF's weights say."""
    model, batch = cross_model(), random_batch(5, subsets=BOTH)
    encoded, objective = spaced(model, batch, scale=0.5), matching(weighting=zeroed)
    space, pairs = encoded.shared[Space], Pairs.of(batch, PAIR, None)
    counts = {name: torch.zeros(5, 5) for name in PAIR}
    for seed in range(100):
        torch.manual_seed(seed)
        drawn = objective._draw(space, ("text", "image"), pairs, batch)
        counts["text"][range(5), drawn["image"][5:10]] += 1
        counts["image"][range(5), drawn["text"][10:]] += 1
    for one, other in (PAIR, PAIR[::-1]):
        weights = zeroed(0.5 * space.rows[one] @ space.keys[other].T, torch.eye(5).bool())
        wanted = 100 * weights / weights.sum(1, keepdim=True)
        off = ~torch.eye(5).bool()
        chi = ((counts[one] - wanted)[off].square() / wanted[off]).view(5, 4).sum(1)
        assert float(chi.max()) < 16.27 + 3  # chi-square with 3 degrees of freedom, 0.001 over ten rows
        assert not counts[one].diagonal().any()


def test_it_listens_to_the_teachers_vectors():
    model, batch = cross_model(), random_batch(6, subsets=BOTH)
    momentum, contrastive = Momentum(0.9, 0.4, 0), MomentumContrastive(PAIR, SPACE, 4, 0.07)
    encoded = model.encode(batch)
    for objective in (momentum, contrastive):
        objective.prepare(model)
        objective(model, encoded, batch)
    assert set(matching()(model, encoded, batch)) == {"text_image"}
    with pytest.raises(ValueError, match="put a contrastive objective in front"):
        matching()(model, model.encode(batch), batch)


def test_a_step_depends_on_its_seed_alone_and_an_evaluation_on_nothing():
    model, batch = cross_model(), random_batch(12, subsets=BOTH)
    objective = matching()

    def loss(seed):
        torch.manual_seed(seed)
        return objective(model, spaced(model, batch), batch)["text_image"].detach()

    assert torch.equal(loss(1), loss(1))
    assert len({float(loss(seed)) for seed in range(4)}) > 1
    objective.eval()
    with torch.no_grad():
        assert torch.equal(loss(1), loss(2))


def test_the_order_of_a_batch_changes_nothing():
    model, batch = cross_model(), random_batch(9, subsets=BOTH)
    objective = matching()
    found = []
    for order in (list(range(9)), [4, 2, 8, 0, 7, 1, 3, 6, 5]):
        torch.manual_seed(2)
        part = batch.select(order)
        found.append(objective(model, spaced(model, part), part)["text_image"].detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_only_samples_that_have_both_take_part_and_pairs_share_the_mean():
    model, batch = cross_model(), random_batch(21)
    objective = matching(["text", "image", "audio"], anchor="text")
    torch.manual_seed(0)
    losses = objective(model, spaced(model, batch, ["text", "image", "audio"]), batch)
    assert set(losses) == {"text_image", "text_audio"}
    every = matching(["text", "image", "audio"])
    assert set(every(model, spaced(model, batch, ["text", "image", "audio"]), batch)) == {*losses, "image_audio"}
    lonely = random_batch(6, subsets=[("text",), ("image",)])
    assert matching()(model, spaced(model, lonely), lonely) == {}


def test_what_shows_the_same_is_no_negative():
    model, batch = cross_model(), random_batch(6, subsets=BOTH)
    batch.targets["icon"] = torch.tensor([0, 0, 1, 1, -100, 2])
    objective = matching(same="icon")
    encoded, icon = spaced(model, batch), [0, 0, 1, 1, 4, 5]
    for seed in range(50):
        torch.manual_seed(seed)
        drawn = objective._draw(encoded.shared[Space], ("text", "image"), Pairs.of(batch, PAIR, "icon"), batch)
        assert all(icon[a] != icon[b] for a, b in zip(drawn["text"][6:], drawn["image"][6:], strict=True))
    batch.targets["icon"] = torch.zeros(6, dtype=torch.long)
    with pytest.raises(ValueError, match="6 of 6 rows have no negative"):
        objective(model, spaced(model, batch), batch)


def test_a_batch_of_one_is_an_error_in_training_and_passed_over_in_evaluation():
    model, batch = cross_model(), random_batch(1, subsets=BOTH)
    objective = matching()
    with pytest.raises(ValueError, match="a batch needs two samples at least"):
        objective(model, spaced(model, batch), batch)
    assert objective.eval()(model, spaced(model, batch), batch) == {}


def test_packed_and_padded_tokens_give_one_loss():
    model, batch = cross_model(), random_batch(7, subsets=BOTH)
    losses = []
    for change in (lambda t: t, to_padded):
        encoded = spaced(model, batch)
        given = Encoded({name: change(t) for name, t in encoded.items()}, 7)
        given.shared = encoded.shared
        torch.manual_seed(4)
        losses.append(matching()(model, given, batch)["text_image"].detach())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_bfloat16_comes_close():
    model, batch = cross_model(), random_batch(8, subsets=BOTH)
    found = []
    for enabled in (False, True):
        encoded = spaced(model, batch)
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(float(matching()(model, encoded, batch)["text_image"].detach()))
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="name two at least"):
        matching(["text"])
    with pytest.raises(ValueError, match="anchor among them"):
        matching(anchor="audio")
    model, batch = cross_model(), random_batch(4, subsets=BOTH)
    with pytest.raises(KeyError, match="no head 'judge'"):
        Matching(PAIR, "judge", excluded, 0)(model, spaced(model, batch), batch)


# ---------------------------------------------------------------------- several processes

CUT = [[0, 2, 3, 6, 7, 9, 10], [1, 4, 5, 8]]
DISJOINT = (("text",), ("text", "image"), ("image", "audio"), ("text", "audio"), ("audio",))


def parts():
    model = cross_model()
    names = ["text", "image", "audio"]
    objectives = [Momentum(0.9, 0.4, 0), MomentumContrastive(names, SPACE, 6, 0.07), matching(names, anchor="text")]
    for objective in objectives:
        objective.prepare(model)
    return model, objectives


def step(batch) -> dict[str, Any]:
    """The losses and gradients of one batch, and the queue after it."""
    model, objectives = parts()
    torch.manual_seed(0)
    encoded, losses = model.encode(batch), {}
    for objective in objectives:
        found = objective(model, encoded, batch)
        losses |= {f"{type(objective).__name__}_{name}": loss for name, loss in found.items()}
    touched = torch.stack([p.flatten()[0] * 0 for p in model.parameters()]).sum()
    (touched + torch.stack(list(losses.values())).sum()).backward()
    for objective in objectives:
        objective.advance(model)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients["scale"] = objectives[1].log_scale.grad
    queue = objectives[1].queues["text"].rows
    return {"losses": {k: v.detach() for k, v in losses.items()}, "gradients": gradients, "queue": queue}


def in_a_process() -> list[dict[str, Any]]:
    rank = dist.get_rank()
    apart = random_batch(11, subsets=BOTH).only(["text"]) if rank else random_batch(11, subsets=BOTH)
    gathered = gather_tokens(None if rank else cross_model().encode(apart)["image"], 11, torch.device("cpu"))
    assert gathered is not None
    assert gathered.num_samples == 22
    whole = random_batch(11)
    return [step(whole.select(CUT[rank])), step(uneven().select(CUT[rank]))]


def uneven():
    """Pairs of both kinds, which all lie in the first process's share."""
    batch = random_batch(11, subsets=BOTH)
    image = batch.inputs["image"].keep({row: row for row in CUT[0]})
    assert image is not None
    return replace(batch, inputs={**batch.inputs, "image": image})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return both(in_a_process, tmp_path_factory.mktemp("matching"))


@pytest.mark.parametrize("case", [0, 1], ids=["mixed", "one process has no pair"])
def test_two_processes_learn_what_one_does(found, case):
    whole = step((random_batch(11), uneven())[case].select(CUT[0] + CUT[1]))
    first, second = (part[case] for part in found)
    assert set(first["losses"]) == set(second["losses"]) == set(whole["losses"])
    for name, loss in whole["losses"].items():
        torch.testing.assert_close((first["losses"][name] + second["losses"][name]) / 2, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in whole["gradients"].items():
        if gradient is not None:
            mean = (first["gradients"][name] + second["gradients"][name]) / 2
            torch.testing.assert_close(mean, gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(first["queue"], whole["queue"], rtol=1e-5, atol=1e-6)
    assert torch.equal(first["queue"], second["queue"])


def test_it_draws_from_the_space_of_a_contrastive_objective_without_a_teacher():
    model, batch = cross_model(), random_batch(6, subsets=BOTH)
    encoded, contrastive = model.encode(batch), Contrastive(PAIR, info_nce, 10.0)
    contrastive(model, encoded, batch)
    space = encoded.shared[Space]
    assert float(space.scale) == pytest.approx(10.0)
    assert not any(rows.requires_grad for rows in (*space.rows.values(), space.scale))
    assert set(matching()(model, encoded, batch)) == {"text_image"}


def test_without_a_weighting_all_others_are_as_likely_and_no_space_is_needed():
    """ViLT. Each of the four others comes about 50 times in 200."""
    model, batch = cross_model(), random_batch(5, subsets=BOTH)
    objective, pairs = matching(weighting=None), Pairs.of(batch, PAIR, None)
    assert set(objective(model, model.encode(batch), batch)) == {"text_image"}
    counts = torch.zeros(5, 5)
    for seed in range(200):
        torch.manual_seed(seed)
        counts[range(5), objective._draw(None, ("text", "image"), pairs, batch)["image"][5:10]] += 1
    assert not counts.diagonal().any()
    off = counts[~torch.eye(5).bool()].view(5, 4)
    assert float(((off - 50).square() / 50).sum(1).max()) < 16.27 + 3
