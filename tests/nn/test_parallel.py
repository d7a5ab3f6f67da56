"""MBT against its layers written out, and what bottlenecks let through."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mmformer.nn import Attention, Block, Bottleneck
from mmformer.nn.sequences import in_order, nothing, seated
from mmformer.tokens import Tokens, merge, to_padded
from tests.helpers import packed_tokens, scramble
from tests.nn import plain

DIM, NAMES = 12, ["text", "image", "audio"]
LENGTHS = {"text": {0: 3, 1: 5, 2: 1}, "image": {1: 4, 0: 2, 3: 2}, "audio": {4: 3, 0: 6}}


def streams() -> dict[str, Tokens]:
    """Six samples: one has all, one nothing, the others something."""
    return {name: packed_tokens(LENGTHS[name], 6, DIM, name, seed) for seed, name in enumerate(NAMES)}


def bottleneck(num_latents: int = 2, depth: int = 3) -> Bottleneck:
    layers = [partial(Block, attention=partial(Attention, num_heads=3))]
    return scramble(Bottleneck(NAMES, DIM, depth, layers, num_latents))


def written_out(model: Bottleneck, sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published loop for one sample: every modality from the same latents, then their mean."""
    latents = model.latents
    for layer in model.layers:
        told = []
        for name, x in sample.items():
            out = plain.block(layer[name], torch.cat([x, latents]))
            sample = sample | {name: out[: len(x)]}
            told.append(out[len(x) :])
        latents = torch.stack(told).mean(0)
    return {name: model.norm(x) for name, x in sample.items()}


@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_published_loop_for_each_sample_alone(padded):
    model = bottleneck()
    given = {name: to_padded(t) if padded else t for name, t in streams().items()}
    out = model(given, 6)
    expected = {
        i: written_out(model, {name: plain.rows(t, name)[i] for name, t in streams().items() if i in LENGTHS[name]})
        for i in range(5)
    }
    mine = {name: plain.rows(out[name], name) for name in NAMES}
    theirs = {name: {i: expected[i][name] for i in LENGTHS[name]} for name in NAMES}
    torch.testing.assert_close(mine, {n: dict(sorted(t.items())) for n, t in theirs.items()}, rtol=1e-5, atol=1e-5)
    weight = torch.randn(20, DIM, generator=torch.Generator().manual_seed(7))
    losses = [sum((x * weight[: len(x)]).sum() for r in found.values() for x in r.values()) for found in (mine, theirs)]
    grads = [plain.gradients(loss, model.parameters()) for loss in losses]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_without_latents_the_modalities_are_encoders_of_their_own():
    model, given = bottleneck(num_latents=0), streams()
    together = model(given, 6)
    for name, tokens in given.items():
        torch.testing.assert_close(together[name].x, model({name: tokens}, 6)[name].x)
        for i, x in plain.rows(tokens, name).items():
            for layer in model.layers:
                x = plain.block(layer[name], x)
            torch.testing.assert_close(plain.rows(together[name], name)[i], model.norm(x), rtol=1e-5, atol=1e-5)


def test_a_modality_hears_of_another_one_layer_late_and_only_through_the_latents():
    for depth, hears in ((1, False), (2, True)):
        given = streams()
        image = given["image"].x.requires_grad_()
        out = bottleneck(depth=depth)(given, 6)["text"].x
        (gradient,) = torch.autograd.grad(out.sum(), image, allow_unused=True)
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) == hears


def test_a_modality_that_a_sample_lacks_has_no_part_in_the_mean():
    model, given = bottleneck(), streams()
    alone = model({"text": packed_tokens({0: 1}, 1, DIM, "text", 3)}, 1)["text"].x
    crowd = {**given, "text": merge([packed_tokens({5: 1}, 6, DIM, "text", 3), given["text"]])}
    torch.testing.assert_close(plain.rows(model(crowd, 6)["text"], "text")[5], alone[0], rtol=1e-5, atol=1e-6)


def test_half_precision_is_close():
    model, given = bottleneck(), streams()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(given, 6)["audio"].x
    torch.testing.assert_close(rough.float(), model(given, 6)["audio"].x, rtol=0.1, atol=0.15)


def test_seats_give_back_what_was_put_into_them_and_leave_the_rest_alone():
    for tokens in (streams()["text"], to_padded(streams()["text"])):
        seats = seated(tokens, 2)
        latents = torch.randn(len(seats.samples), 2, DIM)
        full = seats.put(seats.tokens, latents)
        assert torch.equal(seats.take(full), latents)
        assert torch.equal(seats.rest(full).x, seats.rest(seats.tokens).x)
        torch.testing.assert_close(plain.rows(seats.rest(full), "text"), plain.rows(tokens, "text"))


def test_time_counts_each_segment_and_nothing_is_a_sequence():
    tokens = in_order(streams()["text"], start=1)
    assert tokens.position[0, :, 0].tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 1]
    assert merge([nothing(tokens), tokens]).layout.total == 9
    assert not nothing(to_padded(tokens)).valid.any()
