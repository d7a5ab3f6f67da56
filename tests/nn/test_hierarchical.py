"""Hierarchical attention is a dense one over tokens and summaries that a slow walk over the blocks finds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmformer.nn import Rotary
from mmformer.nn.hierarchical import HierarchicalAttention
from mmformer.visibility import Sights, Visibility
from tests.helpers import packed_tokens, scramble
from tests.nn.mixing import LENGTHS, assert_same_in_all_layouts, flops, gradients, texts

BLOCK, SUMMARIES = 4, 2
CAUSAL = Visibility(causal=True)


def mixer(**options) -> HierarchicalAttention:
    return scramble(HierarchicalAttention(16, 4, BLOCK, SUMMARIES, **options)).double()


def looked_at(query: int, length: int) -> list[range]:
    """The stretches of tokens that a query sees as one: from the top down, a block that is near is opened."""
    found = []

    def near(level: int, block: int) -> bool:
        return abs(block - query // (BLOCK << level)) <= 1

    def open_block(level: int, block: int) -> None:
        start, stop = block * (BLOCK << level), min(length, (block + 1) * (BLOCK << level))
        if start >= length:
            return
        if not near(level, block):
            step = (BLOCK << level) // SUMMARIES
            found.extend(range(at, min(at + step, stop)) for at in range(start, stop, step))
        elif level:
            open_block(level - 1, 2 * block)
            open_block(level - 1, 2 * block + 1)
        else:
            found.extend(range(at, at + 1) for at in range(start, stop))

    open_block(math.ceil(math.log2(max(length, BLOCK) / BLOCK)), 0)
    return found


def slow(layer: HierarchicalAttention, x: Tensor, time: Tensor, causal: bool) -> Tensor:
    q, k, v = layer.qkv(x).view(len(x), 3, layer.heads, -1).unbind(1)
    out = []
    for query in range(len(x)):
        stretches = [list(s) for s in looked_at(query, len(x))]
        if causal:
            stretches = [s for s in stretches if time[s].max() <= time[query]]
        keys, values = (torch.stack([values[s].mean(0) for s in stretches]) for values in (k, v))
        count = torch.tensor([len(s) for s in stretches]).to(x.dtype)
        scores = torch.einsum("hd,khd->hk", q[query], keys) / q.shape[-1] ** 0.5 + count.log()
        out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values).flatten())
    return layer.out(torch.stack(out))


@pytest.mark.parametrize("length", [1, 3, 4, 9, 17, 41, 71])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_slow_walk_forward_and_backward(length: int, causal: bool) -> None:
    layer, tokens = mixer(), texts({0: length}, 16)
    x = tokens.x.requires_grad_()
    ours = layer(tokens.with_x(x), None, Sights(tokens, tokens, Visibility(causal=causal)))[0, :length]
    wanted = slow(layer, x[0, :length], tokens.position[0, :, 0], causal)
    torch.testing.assert_close(ours, wanted)
    inputs = [x, *layer.parameters()]
    for got, expected in zip(gradients(ours, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("query", [0, 13, 40, 99])
def test_the_walk_sees_every_key_once(query: int) -> None:
    assert sorted(i for stretch in looked_at(query, 100) for i in stretch) == list(range(100))


def test_where_all_keys_are_equal_it_is_full_attention() -> None:
    layer, tokens = mixer(), texts({0: 71}, 16)
    with torch.no_grad():
        layer.qkv.weight[16:32] = 0
    mean = layer.qkv(tokens.x[0, :71]).chunk(3, -1)[2].mean(0)
    got = layer(tokens, None, Sights(tokens, tokens))[0, :71]
    torch.testing.assert_close(got, layer.out(mean).expand(71, -1))


def test_a_causal_rule_holds_where_times_are_shared() -> None:
    layer, tokens = mixer(), texts({0: 41}, 16)
    tokens.position[0, :, 0] = torch.arange(42) // 7 * 3
    got = layer(tokens, None, Sights(tokens, tokens, CAUSAL))[0, :41]
    torch.testing.assert_close(got, slow(layer, tokens.x[0, :41], tokens.position[0, :, 0], True))


@pytest.mark.parametrize("causal", [False, True])
def test_layouts_agree(causal: bool) -> None:
    assert_same_in_all_layouts(mixer(rotary=Rotary), texts(LENGTHS, 16), Visibility(causal=causal))


def test_half_precision_is_near() -> None:
    layer, tokens = mixer(), texts(LENGTHS, 16)
    with torch.no_grad():
        layer.qkv.weight.mul_(0.3)
    wanted = layer(tokens, None, Sights(tokens, tokens))
    half = tokens.with_x(tokens.x.bfloat16())
    got = layer.bfloat16()(half, None, Sights(half, half))
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_cost_grows_little_faster_than_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        scores.append(q.shape[0] * q.shape[2] * k.shape[2])
        return attend(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    layer = HierarchicalAttention(8, 1, 64, 16)
    for length in (8192, 16384):
        tokens = packed_tokens({0: length}, 1, 8)
        with torch.no_grad():
            layer(tokens, None, Sights(tokens, tokens))
    assert scores == [8192 * (3 * 64 + 6 * 3 * 16), 16384 * (3 * 64 + 7 * 3 * 16)]
    assert scores[1] <= 2.2 * scores[0]
    assert flops(layer, 300, 8) > 0


def test_what_it_cannot_do_it_refuses() -> None:
    tokens = packed_tokens({0: 3}, 1, 16)
    with pytest.raises(ValueError, match=r"hierarchical attention cannot honour .*window=2"):
        mixer().float()(tokens, None, Sights(tokens, tokens, Visibility(window=2)))
    with pytest.raises(ValueError, match="blocks of 6 tokens do not divide into 4 summaries"):
        HierarchicalAttention(16, 4, 6, 4)
    empty = packed_tokens({}, 3, 16)
    assert mixer().float()(empty, None, Sights(empty, empty)).shape == (1, 0, 16)
