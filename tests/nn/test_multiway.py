"""Experts in attention, norms and feed-forward maps: BEiT-3's layer written out, and what equal experts are."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmformer.nn import Attention, Block, ByModality, FeedForward, MultiwayAttention, Transformer
from mmformer.tokens import LATENT, Tokens, merge, to_padded
from tests.helpers import packed_tokens, scramble
from tests.nn import plain

DIM, NAMES = 12, ["image", "text"]
ATTENTION = partial(MultiwayAttention, num_heads=3)
SUB_NORMED = partial(FeedForward, expansion=2.5, inner_norm=nn.LayerNorm)


def tokens() -> Tokens:
    """Three samples, of which one has only a picture and one only a text."""
    latents = packed_tokens({0: 1, 1: 1, 2: 1}, 3, DIM, LATENT, 3)
    return merge(
        [latents, packed_tokens({0: 4, 2: 2}, 3, DIM, "image"), packed_tokens({0: 3, 1: 5}, 3, DIM, "text", 1)]
    )


def beit3(experts: dict[str, list[str]], depth: int = 2) -> Transformer:
    """A Transformer with experts for the named modalities in each kind of part."""
    norm = partial(ByModality, part=nn.LayerNorm, modalities=experts["norm"])
    feedforward = partial(ByModality, part=SUB_NORMED, modalities=experts["feedforward"])
    attention = partial(ATTENTION, modalities=experts["attention"], inner_norm=nn.LayerNorm)
    layer = partial(Block, attention=attention, feedforward=feedforward, norm=norm)
    return scramble(Transformer(DIM, depth, [layer], norm=norm))


def chosen(part: ByModality, x: list[tuple[str, Tensor]]) -> list[Tensor]:
    """Each vector through the expert of its modality."""
    return [part.parts[name if name in part.parts else "others"](row) for name, row in x]


def written_out(model: Transformer, names: list[str], x: Tensor) -> Tensor:
    """The published layer for one sample, token by token where weights differ."""

    def each(part: ByModality, x: Tensor) -> Tensor:
        return torch.stack(chosen(part, list(zip(names, x, strict=True))))

    for layer in model.layers:
        q, k, v = each(layer.attention.qkv, each(layer.attention_norm, x)).chunk(3, -1)
        seen = each(layer.attention.inner_norm, plain.attend(q, k, v, 3))
        x = x + each(layer.attention.out, seen)
        rows = []
        for name, row in zip(names, each(layer.feedforward_norm, x), strict=True):
            expert = layer.feedforward.parts[name if name in layer.feedforward.parts else "others"]
            rows.append(expert.down(expert.inner_norm(F.gelu(expert.up(row)))))
        x = x + torch.stack(rows)
    return each(model.norm, x)


EXPERTS = {
    "released code": {"attention": NAMES, "norm": NAMES, "feedforward": NAMES},
    "paper": {"attention": [], "norm": [], "feedforward": NAMES},
    "none": {"attention": [], "norm": [], "feedforward": []},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", EXPERTS)
def test_it_is_the_published_layer_for_each_sample_alone(kind, padded):
    model, given = beit3(EXPERTS[kind]), tokens()
    out = model(to_padded(given) if padded else given)
    mine, theirs = [], []
    for i in range(3):
        parts = {n: plain.rows(given, n).get(i) for n in (LATENT, *NAMES)}
        names = [n for n, x in parts.items() if x is not None for _ in x]
        expected = written_out(model, names, torch.cat([x for x in parts.values() if x is not None]))
        mine.append(out.x.flatten(0, 1)[(out.sample() == i).flatten()])
        theirs.append(expected)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    weight = torch.randn(8, DIM, generator=torch.Generator().manual_seed(7))
    losses = [sum((x * weight[: len(x)]).sum() for x in found) for found in (mine, theirs)]
    grads = [plain.gradients(loss, model.parameters()) for loss in losses]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_equal_experts_are_the_plain_block():
    plain_block = partial(Block, attention=partial(Attention, num_heads=3), feedforward=SUB_NORMED)
    expected = scramble(Transformer(DIM, 2, [plain_block]))
    experts = partial(ByModality, modalities=NAMES)
    layer = partial(
        Block, attention=partial(ATTENTION, modalities=NAMES), norm=partial(experts, part=nn.LayerNorm),
        feedforward=partial(experts, part=SUB_NORMED),
    )  # fmt: skip
    model = Transformer(DIM, 2, [layer], norm=partial(experts, part=nn.LayerNorm))
    known = expected.state_dict()
    model.load_state_dict({key: known[_without_expert(key)] for key in model.state_dict()})
    torch.testing.assert_close(model(tokens()).x, expected(tokens()).x, rtol=1e-5, atol=1e-5)


def _without_expert(key: str) -> str:
    """layers.0.attention.qkv.parts.text.weight -> layers.0.attention.qkv.weight"""
    before, _, after = key.partition(".parts.")
    return f"{before}.{after.split('.', 1)[1]}" if after else key


def test_the_weights_of_a_modality_change_its_own_maps_alone():
    model, given = beit3(EXPERTS["paper"], depth=1), tokens()
    before = model(given).x
    with torch.no_grad():
        model.layers[0].feedforward.parts["text"].down.bias += 1
    changed = (model(given).x != before).any(-1)[0]
    assert torch.equal(changed, (given.modality == packed_tokens({0: 1}, 1, DIM, "text").modality[0, 0])[0])


def test_half_precision_is_close():
    model, given = beit3(EXPERTS["released code"]), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(given).x
    torch.testing.assert_close(rough.float(), model(given).x, rtol=0.1, atol=0.1)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="10 channels do not divide by 4 heads"):
        MultiwayAttention(10, 4, NAMES)
