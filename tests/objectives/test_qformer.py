import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mmformer.losses.matching import masked
from mmformer.nn import Memory
from mmformer.objectives import Matching, NextToken, QueryContrastive, StartingWith
from mmformer.objectives.space import Space
from mmformer.objectives.starting import starting_with
from mmformer.tokens import LATENT, modality_id, to_padded
from mmformer.visibility import Visibility
from tests.helpers import random_batch
from tests.objectives.alignment import SPACE, query_model
from tests.processes import both

QUERIES, BOTH = 3, (("text", "image"),)
CAUSAL = Visibility(causal=True)


def contrastive(modalities=("text", "image"), smoothing=0.1):
    return QueryContrastive(list(modalities), 0.07, smoothing)


def two_passes(model, batch, other="image"):
    """What queries and text say in passes of their own: LAVIS' way, by the views."""
    encoded = model.encode(batch.only(["text", other]))
    return model.output(encoded, "text", "text")[0], model.output(encoded, other, other)[0]


def loop(texts, queries, smoothing):
    """BLIP-2's contrastive loss in plain loops."""
    size, total = len(texts), 0.0
    best = [[max(float(q @ t) for q in row.view(QUERIES, SPACE)) / 0.07 for t in texts] for row in queries]
    for i in range(size):
        for row in (best[i], [best[j][i] for j in range(size)]):
            log_sum = math.log(sum(math.exp(x) for x in row))
            target = [(1 - smoothing) * (i == j) + smoothing / size for j in range(size)]
            total -= sum(t * (x - log_sum) for t, x in zip(target, row, strict=True))
    return total / (2 * size)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_pass_is_the_loop_of_the_paper_over_two(smoothing):
    model, batch = query_model().double(), random_batch(6, subsets=BOTH)
    objective = contrastive(smoothing=smoothing).double()
    loss = objective(model, model.encode(batch), batch)["text_image"]
    texts, queries = two_passes(model, batch)
    assert float(loss.detach()) == pytest.approx(loop(texts.detach(), queries.detach(), smoothing), rel=1e-6)


def test_the_gradients_of_one_pass_are_those_of_two():
    model, batch = query_model().double(), random_batch(6, subsets=BOTH)
    parameters = [p for name, p in model.named_parameters() if not name.startswith(("heads.match", "heads.voc"))]
    loss = contrastive().double()(model, model.encode(batch), batch)["text_image"]
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    texts, queries = two_passes(model, batch)
    best = torch.stack([(part @ texts.T) for part in queries.view(6, QUERIES, SPACE)]).amax(1) / 0.07
    target = torch.arange(6)
    wanted = sum(F.cross_entropy(x, target, label_smoothing=0.1) / 2 for x in (best, best.T))
    for got, want in zip(ours, torch.autograd.grad(wanted, parameters, allow_unused=True), strict=True):
        if want is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # unit vectors are in single precision


def test_the_judge_sees_all_and_the_writer_only_what_came_before():
    """The three masks of the paper's figure 2, by which inputs each token's vector depends on."""
    model, batch = query_model(), random_batch(1, seed=3, subsets=BOTH)
    rules = {"apart": contrastive().apart, "judge": None, "write": CAUSAL}
    encoded = model.encode(batch)
    latent, length = modality_id(LATENT), encoded["text"].x.shape[1]
    assert length > 2

    def seen(rule, place):
        """Which of the texts' places and whether the queries change with the text at `place`."""
        moved = model.encode(batch)
        x = moved["text"].x.clone()
        x[:, place] += 1
        moved["text"] = moved["text"].with_x(x)
        before, after = model.fuse(model.encode(batch), rule), model.fuse(moved, rule)
        changed = (before.x != after.x).any(-1)[0]
        queries = before.modality[0] == latent
        return changed[~queries].tolist(), bool(changed[queries].any())

    for place in range(length):
        assert seen(rules["apart"], place) == ([True] * length, False)
        assert seen(rules["judge"], place) == ([True] * length, True)
        assert seen(rules["write"], place) == ([i >= place for i in range(length)], False)


def test_writing_in_one_pass_is_writing_behind_remembered_queries():
    """LAVIS runs the queries first and gives their keys and values to the text."""
    model, batch = query_model(), random_batch(5, subsets=BOTH)
    encoded = model.encode(batch)
    once = model.fuse(encoded, CAUSAL)
    alone = model.fuse(encoded.only(["image"]), CAUSAL)
    queries = once.modality[0] == modality_id(LATENT)
    for sample in range(5):
        mine = once.x[0][(once.sample()[0] == sample) & queries]
        theirs = alone.x[0][alone.sample()[0] == sample]
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def remembering(model, batch, first, smoothing):
    """The loss of writing as LAVIS computes it: the queries run first, and the text sees their keys and values."""
    encoded, memory = model.encode(batch.only(["image"])), Memory("text")
    model.fusion(encoded, len(batch), CAUSAL, memory)
    items = starting_with(batch.inputs["text"], first)
    texts = to_padded(model.encoders["text"](items, len(batch)))
    spoken = model.fusion.extend("text", texts, memory, CAUSAL)
    logits = [model.heads["vocabulary"](spoken.x[row, : len(ids) - 1]) for row, ids in items.items()]
    wanted = [ids[1:] for _, ids in items.items()]
    return F.cross_entropy(torch.cat(logits), torch.cat(wanted), label_smoothing=smoothing)


def test_the_loss_of_writing_and_its_gradients_are_those_of_a_second_pass_over_remembered_queries():
    model, batch = query_model().double(), random_batch(6, subsets=BOTH)
    objective = StartingWith(NextToken("vocabulary", smoothing=0.1, visibility=CAUSAL), first=1)
    loss = objective(model, model.encode(batch), batch)["loss"]
    expected = remembering(model, batch, 1, 0.1)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    ours, theirs = (torch.autograd.grad(x, list(model.parameters()), allow_unused=True) for x in (loss, expected))
    touched = 0
    for got, want in zip(ours, theirs, strict=True):
        if want is None:
            assert got is None or not got.any()
        else:
            touched += bool(want.any())
            assert (got - want).norm() <= 1e-6 * want.norm()
    assert touched > 50


def test_the_three_losses_of_the_first_stage_run_together_and_reach_every_part():
    model, batch = query_model(), random_batch(8, subsets=BOTH)
    objectives = [
        contrastive(),
        Matching(["text", "image"], "match", masked, top=3),
        StartingWith(NextToken("vocabulary", smoothing=0.1, visibility=CAUSAL), first=1),
    ]
    encoded, found = model.encode(batch), {}
    for objective in objectives:
        found |= {f"{type(objective).__name__}_{k}": v for k, v in objective(model, encoded, batch).items()}
    assert set(found) == {"QueryContrastive_text_image", "Matching_text_image", "StartingWith_loss"}
    torch.stack(list(found.values())).sum().backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None and not n.startswith(("encoders.a", "heads.a"))}
    assert all("audio" in name for name in unused), unused

    meter = objectives[0].meter()
    meter.update(objectives[0].predict(model, encoded, batch), batch)
    prediction = objectives[1].predict(model, encoded, batch)
    again = objectives[1].meter()
    again.update(prediction, batch)
    assert {"r@1", "t2i_r@1", "i2t_r@10"} <= set(meter.compute())
    assert "rerank_t2i_r@1" in again.compute()


def test_every_modality_beside_the_text_counts_and_missing_ones_do_not():
    model, batch = query_model(), random_batch(21)
    objective = contrastive(["text", "image", "audio"])
    encoded = model.encode(batch)
    found = objective(model, encoded, batch)
    assert set(found) == {"text_image", "text_audio"}
    rows = [i for i, has in enumerate(batch.present()) if has >= {"text", "audio"}]
    part = batch.only(["text", "audio"]).select(rows)
    alone = contrastive(["text", "audio"])(model, model.encode(part), part)
    torch.testing.assert_close(found["text_audio"], alone["text_audio"] / 2, rtol=1e-5, atol=1e-6)
    assert encoded.shared[Space].rows["audio"].shape == (21, QUERIES * SPACE)
    lonely = random_batch(4, subsets=[("text",), ("image",)])
    assert objective(model, model.encode(lonely), lonely) == {}
    with pytest.raises(ValueError, match="name what the queries look at"):
        contrastive(["text"])


def parts(batch) -> dict[str, Any]:
    model, objective = query_model(), contrastive(["text", "image", "audio"])
    torch.manual_seed(0)
    encoded = model.encode(batch)
    losses = objective(model, encoded, batch)
    touched = torch.stack([p.flatten()[0] * 0 for p in model.parameters()]).sum()
    (touched + torch.stack(list(losses.values())).sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()} | {"scale": objective.log_scale.grad}
    return {"losses": {k: v.detach() for k, v in losses.items()}, "gradients": gradients}


CUT = [[0, 2, 3, 6, 7, 9], [1, 4, 5, 8]]


def in_a_process() -> list[dict[str, Any]]:
    rank = dist.get_rank()
    without = random_batch(10, subsets=BOTH).select(CUT[rank])
    return [parts(random_batch(10).select(CUT[rank])), parts(without.only(["image"]) if rank else without)]


def test_two_processes_learn_what_one_does(tmp_path):
    found = both(in_a_process, tmp_path)
    pairs = random_batch(10, subsets=BOTH).select(CUT[0])
    for case, batch in enumerate((random_batch(10).select(CUT[0] + CUT[1]), pairs)):
        whole, (first, second) = parts(batch), [part[case] for part in found]
        for name, loss in whole["losses"].items():
            mean = (first["losses"][name] + second["losses"][name]) / 2
            torch.testing.assert_close(mean, loss, rtol=1e-5, atol=1e-6)
        for name, gradient in whole["gradients"].items():
            if gradient is not None:
                mean = (first["gradients"][name] + second["gradients"][name]) / 2
                torch.testing.assert_close(mean, gradient, rtol=1e-5, atol=1e-5)
