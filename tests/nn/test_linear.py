"""Linear attention is its quadratic form, token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmformer.nn.linear import LinearAttention
from mmformer.visibility import Sights, Visibility
from tests.helpers import packed_tokens, scramble
from tests.nn.mixing import LENGTHS, assert_same_in_all_layouts, flops, gradients, texts


def mixer() -> LinearAttention:
    return scramble(LinearAttention(16, 4, chunk=4)).double()


def slow(layer: LinearAttention, x: Tensor, causal: bool) -> Tensor:
    q, k, v = layer.qkv(x).view(len(x), 3, layer.heads, -1).unbind(1)
    weights = torch.einsum("qhd,khd->hqk", F.elu(q) + 1, F.elu(k) + 1)
    weights = weights.tril() if causal else weights
    return layer.out(torch.einsum("hqk,khd->qhd", weights / (weights.sum(-1, keepdim=True) + 1e-6), v).flatten(1))


@pytest.mark.parametrize("length", [1, 4, 7, 50])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_quadratic_form_forward_and_backward(length: int, causal: bool) -> None:
    layer, tokens = mixer(), texts({0: length}, 16)
    x = tokens.x.requires_grad_()
    ours = layer(tokens.with_x(x), None, Sights(tokens, tokens, Visibility(causal=causal)))[0, :length]
    wanted = slow(layer, x[0, :length], causal)
    torch.testing.assert_close(ours, wanted)
    inputs = [x, *layer.parameters()]
    for got, expected in zip(gradients(ours, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_layouts_agree(causal: bool) -> None:
    assert_same_in_all_layouts(mixer(), texts(LENGTHS, 16), Visibility(causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_cost_grows_with_the_length(causal: bool) -> None:
    layer, rule = LinearAttention(8, 1), Visibility(causal=causal)
    assert flops(layer, 16384, 8, rule) <= 2.01 * flops(layer, 8192, 8, rule)


def test_what_it_cannot_do_it_refuses() -> None:
    layer, tokens = mixer().float(), packed_tokens({0: 3}, 1, 16)
    with pytest.raises(ValueError, match=r"linear attention cannot honour .*window=2"):
        layer(tokens, None, Sights(tokens, tokens, Visibility(window=2)))
    tokens.position[0, :, 0] = torch.tensor([0, 2, 1])
    assert layer(tokens, None, Sights(tokens, tokens)).isfinite().all()
    with pytest.raises(ValueError, match=r"here time goes back: .*fusion.sequential"):
        layer(tokens, None, Sights(tokens, tokens, Visibility(causal=True)))
    empty = packed_tokens({}, 3, 16)
    assert layer(empty, None, Sights(empty, empty, Visibility(causal=True))).shape == (1, 0, 16)


def test_half_precision_is_near() -> None:
    layer, tokens = mixer(), texts(LENGTHS, 16)
    wanted = layer(tokens, None, Sights(tokens, tokens))
    half = tokens.with_x(tokens.x.bfloat16())
    got = layer.bfloat16()(half, None, Sights(half, half))
    assert (got - wanted).norm() < 0.05 * wanted.norm()
