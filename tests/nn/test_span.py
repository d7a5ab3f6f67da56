"""Adaptive span is the masked softmax of its formula, and costs what the spans are."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from mmformer.nn import Block, Rotary, Transformer
from mmformer.nn.memory import Memory
from mmformer.nn.span import AdaptiveSpan
from mmformer.tokens import Tokens
from mmformer.visibility import Sights, Visibility
from tests.helpers import packed_tokens, scramble
from tests.nn.mixing import LENGTHS, assert_same_in_all_layouts, flops, gradients, texts

SPANS = [0.0, 0.3, 0.62, 1.0]


def mixer(max_span: int = 24, ramp: int = 5, block: int = 4, **options) -> AdaptiveSpan:
    made = scramble(AdaptiveSpan(16, 4, max_span, ramp=ramp, block=block, **options)).double()
    with torch.no_grad():
        made.z.copy_(torch.tensor(SPANS))
    return made


def formula(layer: AdaptiveSpan, x: Tensor, seen: Tensor, z: Tensor) -> Tensor:
    """One segment, all pairs, in plain words: m exp(s) over its sum (equation 4 of the paper)."""
    q, k, v = layer.qkv(x).view(len(x), 3, layer.heads, -1).unbind(1)
    distance = (torch.arange(len(x)) - torch.arange(len(x))[:, None]).abs()
    out = []
    for head in range(layer.heads):
        mask = ((layer.ramp + z[head] * layer.max_span - distance) / layer.ramp).clamp(0, 1)
        near = seen & (distance < layer.max_span)
        scores = (q[:, head] @ k[:, head].T) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~near, -torch.inf).exp() * mask
        out.append(weights / weights.sum(-1, keepdim=True) @ v[:, head])
    return layer.out(torch.cat(out, -1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("max_span", [6, 24, 100])
def test_it_is_its_formula_forward_and_backward(max_span: int, causal: bool) -> None:
    layer, tokens = mixer(max_span), texts({0: 61}, 16)
    x = tokens.x.requires_grad_()
    inputs = [x, *layer.parameters()]
    ours = layer(tokens.with_x(x), None, Sights(tokens, tokens, Visibility(causal=causal)))[0, :61]
    seen = torch.ones(61, 61).tril().bool() if causal else torch.ones(61, 61).bool()
    wanted = formula(layer, x[0, :61], seen, layer.z)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    for got, expected in zip(gradients(ours, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", [Visibility(), Visibility(causal=True), Visibility(window=2)], ids=str)
def test_layouts_agree(rule: Visibility) -> None:
    assert_same_in_all_layouts(mixer(), texts(LENGTHS, 16), rule)
    assert_same_in_all_layouts(mixer(rotary=Rotary), texts(LENGTHS, 16), rule)


def test_a_rule_holds_where_times_are_shared() -> None:
    """Tokens of a picture see each other under a causal rule, ahead too."""
    layer, tokens = mixer(), texts({0: 40}, 16)
    time = torch.arange(42) // 3
    tokens.position[0, :, 0] = time
    ours = layer(tokens, None, Sights(tokens, tokens, Visibility(causal=True)))[0, :40]
    seen = time[None, :40] <= time[:40, None]
    torch.testing.assert_close(ours, formula(layer, tokens.x[0, :40], seen, layer.z), rtol=1e-6, atol=1e-6)


def test_what_is_computed_follows_the_spans() -> None:
    layer = AdaptiveSpan(16, 4, 1024, ramp=8, block=64)
    base = 3 * 2 * 4 * 16 * 16  # the linear maps, forward and backward, for each token

    def scores(length: int, *z: float) -> float:
        with torch.no_grad():
            layer.z.copy_(torch.tensor(z))
        return flops(layer, length, 16) - base * length

    short, half = scores(2048, 0, 0, 0, 0), scores(2048, 0, 0, 0, 0.5)
    each = 6 * 2 * 4  # products of 4 channels, forward and backward
    assert short == 4 * each * 2048 * 3 * 64
    assert half == 3 * each * 2048 * 3 * 64 + each * (4 * 576) * 3 * 576
    assert scores(4096, 0, 0, 0, 0.5) == pytest.approx(2 * half, rel=0.03)
    assert layer.reaches() == {64: [0, 1, 2], 576: [3]}


def test_a_span_outside_its_bounds_counts_as_the_bound_and_comes_back() -> None:
    layer = mixer()
    with torch.no_grad():
        layer.z.copy_(torch.tensor([-0.5, 1.5, 0.5, 0.0]))
    torch.testing.assert_close(layer.span(), torch.tensor([0, 24, 12, 0]).double())
    assert torch.autograd.grad(layer.span().sum(), layer.z)[0].tolist() == [24.0] * 4
    layer.clamp()
    assert layer.z.tolist() == [0, 1, 0.5, 0]


def test_bfloat16_is_near() -> None:
    layer, tokens = mixer(), texts(LENGTHS, 16)
    wanted = layer(tokens, None, Sights(tokens, tokens))
    half = tokens.with_x(tokens.x.bfloat16())
    torch.testing.assert_close(layer.bfloat16()(half, None, Sights(half, half)).double(), wanted, rtol=0.1, atol=0.1)


def test_no_tokens_and_a_memory() -> None:
    empty: Tokens = packed_tokens({}, 3, 16)
    assert AdaptiveSpan(16, 4, 8)(empty, None, Sights(empty, empty)).shape == (1, 0, 16)
    stack = Transformer(16, 1, [partial(Block, attention=partial(AdaptiveSpan, num_heads=4, max_span=8))])
    with pytest.raises(ValueError, match="adaptive span keeps no memory"):
        stack(packed_tokens({0: 3}, 1, 16), visibility=Visibility(causal=True), memory=Memory("text"))
