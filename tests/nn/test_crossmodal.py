"""MulT against its published loop, written out for one sample at a time."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmformer.nn import Attention, Block, CrossAttention, Crossmodal, FeedForward, JointNorm, SinusoidTable, Transformer
from mmformer.pooling import EndPool
from mmformer.tokens import Tokens, merge, to_padded
from mmformer.visibility import Visibility
from tests.helpers import packed_tokens, scramble
from tests.nn import plain

DIM, NAMES = 6, ["text", "image", "audio"]
LENGTHS = {"text": {0: 3, 1: 5, 2: 1}, "image": {1: 2, 0: 4, 3: 2}, "audio": {4: 3, 0: 6, 1: 1}}
RELU = partial(FeedForward, activation=nn.ReLU)


def streams() -> dict[str, Tokens]:
    return {name: packed_tokens(LENGTHS[name], 6, DIM, name, seed) for seed, name in enumerate(NAMES)}


def crossmodal(causal: bool = True) -> Crossmodal:
    rule = Visibility(causal=causal)
    looking = partial(JointNorm, part=partial(CrossAttention, num_heads=2, visibility=rule))
    norms = {"cross": nn.Identity, "feedforward": nn.LayerNorm}
    pair = partial(Block, cross=looking, feedforward=RELU, norm=norms)
    own = partial(Block, attention=partial(Attention, num_heads=2), feedforward=RELU)
    return scramble(
        Crossmodal(
            NAMES, DIM,
            cross=partial(Transformer, depth=2, layers=[pair]),
            alone=partial(Transformer, depth=3, layers=[own], visibility=rule),
            position=partial(SinusoidTable, num_positions=20),
        )
    )  # fmt: skip


def embedded(x: Tensor) -> Tensor:
    """Scaled, with the published sines and cosines of places 1, 2, ..."""
    half = x.shape[1] // 2
    rates = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    angles = torch.arange(1, len(x) + 1)[:, None] * rates
    return math.sqrt(x.shape[1]) * x + torch.cat([angles.sin(), angles.cos()], 1)


def not_ahead(queries: int, keys: int) -> Tensor:
    return torch.triu(torch.ones(queries, keys), 1 + abs(keys - queries)) == 0


def written_out(model: Crossmodal, sample: dict[str, Tensor], causal: bool) -> dict[str, Tensor]:
    out = {}
    for name in sample:
        told = []
        for other in model.others[name]:
            stack = model.cross[name][other]
            x = embedded(sample[name])
            for layer in stack.layers:
                if other in sample:
                    keys = embedded(sample[other])
                    seen = not_ahead(len(x), len(keys)) if causal else None
                    norm, looking = layer.cross.norm, layer.cross.part
                    x = x + plain.cross_attention(looking, norm(x), norm(keys), seen)
                x = plain.feedforward(layer, x, F.relu)
            told.append(stack.norm(x))
        x = embedded(torch.cat(told, 1))
        for layer in model.alone[name].layers:
            x = plain.block(layer, x, not_ahead(len(x), len(x)) if causal else None, F.relu)
        out[name] = model.alone[name].norm(x)
    return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_published_loop_for_each_sample_alone(padded, causal):
    model = crossmodal(causal)
    given = {name: to_padded(t) if padded else t for name, t in streams().items()}
    out = model(given, 6)
    mine = {name: plain.rows(out[name], name) for name in NAMES}
    samples = [{n: plain.rows(t, n)[i] for n, t in streams().items() if i in LENGTHS[n]} for i in range(5)]
    expected = [written_out(model, sample, causal) for sample in samples]
    theirs = {name: {i: expected[i][name] for i in sorted(LENGTHS[name])} for name in NAMES}
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    weight = torch.randn(20, 2 * DIM, generator=torch.Generator().manual_seed(7))
    losses = [sum((x * weight[: len(x)]).sum() for r in found.values() for x in r.values()) for found in (mine, theirs)]
    grads = [plain.gradients(loss, model.parameters()) for loss in losses]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_a_modality_that_the_whole_batch_lacks_is_one_that_each_sample_lacks():
    model, given = crossmodal(), streams()
    given["audio"] = packed_tokens({5: 2}, 6, DIM, "audio", 2)
    with_one, without = model(given, 6), model({n: t for n, t in given.items() if n != "audio"}, 6)
    assert "audio" not in without
    torch.testing.assert_close(with_one["text"].x, without["text"].x, rtol=1e-5, atol=1e-5)


def test_the_last_steps_stand_side_by_side_with_zeros_for_what_is_absent():
    model = crossmodal()
    out = model(streams(), 6)
    last = EndPool(NAMES, last=True, joined=True)(merge(list(out.values())))
    for row in range(6):
        steps = [plain.rows(out[n], n)[row][-1] if row in LENGTHS[n] else torch.zeros(2 * DIM) for n in NAMES]
        assert torch.equal(last[row], torch.cat(steps))


def test_half_precision_is_close():
    model, given = crossmodal(), streams()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(given, 6)["audio"].x
    torch.testing.assert_close(rough.float(), model(given, 6)["audio"].x, rtol=0.1, atol=0.25)


def test_one_modality_has_no_pair():
    with pytest.raises(ValueError, match=r"pairs of \['text'\]: name two"):
        Crossmodal(["text"], DIM, nn.Identity, nn.Identity, nn.Identity)
