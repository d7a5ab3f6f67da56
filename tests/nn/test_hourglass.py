"""Layers over shortened sequences are what their words say, written out for one segment; nothing leaks from later."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mmformer.nn import Attention, Block, LinearAttention, Transformer
from mmformer.nn.hourglass import Document, Hourglass
from mmformer.nn.memory import Memory
from mmformer.tokens import Tokens
from mmformer.visibility import Sights, Visibility
from tests.helpers import packed_tokens, scramble
from tests.nn import plain
from tests.nn.mixing import LENGTHS, assert_same_in_all_layouts, flops, texts

LAYER = partial(Block, attention=partial(Attention, num_heads=4))
CAUSAL = Visibility(causal=True)


def hourglass(factor: int = 3) -> Hourglass:
    return scramble(Hourglass(16, [LAYER, LAYER], factor)).double()


def document(chunk: int = 8) -> Document:
    return scramble(Document(16, [LAYER], [LAYER], chunk)).double()


class Mixer(nn.Module):
    """A layer with the call of a mixer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tokens, context: None, sights: Sights) -> Tensor:
        return self.layer(tokens, context, sights, None).x


def blocks(layers: nn.ModuleList, x: Tensor, seen: Tensor | None) -> Tensor:
    for layer in layers:
        x = plain.block(layer, x, seen)
    return x


def slow_hourglass(layer: Hourglass, x: Tensor, causal: bool) -> Tensor:
    k, n = layer.factor, len(x)
    groups = -(-n // k)
    if causal:
        pooled = torch.stack([x[max(0, g * k - k + 1) : g * k + 1].mean(0) for g in range(groups)])
    else:
        pooled = torch.stack([x[g * k : g * k + k].mean(0) for g in range(groups)])
    mixed = blocks(layer.layers, pooled, torch.ones(groups, groups).tril().bool() if causal else None)
    return x + layer.up(layer.norm(mixed)).view(groups * k, -1)[:n]


def slow_document(layer: Document, x: Tensor, causal: bool) -> Tensor:
    chunks = x.split(layer.chunk)
    read = [blocks(layer.inner, c, torch.ones(len(c), len(c)).tril().bool() if causal else None) for c in chunks]
    pooled = torch.stack([c.mean(0) for c in read])
    mixed = blocks(layer.outer, pooled, torch.ones(len(read), len(read)).tril().bool() if causal else None)
    back = layer.back(layer.norm(mixed))
    if causal:
        back = torch.cat([torch.zeros_like(back[:1]), back[:-1]])
    return torch.cat([c + row for c, row in zip(read, back, strict=True)])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("made", [hourglass, document])
def test_it_is_its_words_forward_and_backward(made, causal: bool) -> None:
    layer, tokens = made(), texts({0: 38}, 16)
    slow = slow_hourglass if isinstance(layer, Hourglass) else slow_document
    x = tokens.x.requires_grad_()
    ours = layer(tokens.with_x(x), None, Sights(tokens, tokens, Visibility(causal=causal)), None).x[0, :38]
    wanted = slow(layer, x[0, :38], causal)
    torch.testing.assert_close(ours, wanted)
    inputs = [x, *layer.parameters()]
    for got, expected in zip(
        plain.gradients(ours.cos().sum(), inputs), plain.gradients(wanted.cos().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("made", [hourglass, document])
def test_layouts_agree(made, causal: bool) -> None:
    assert_same_in_all_layouts(Mixer(made()), texts(LENGTHS, 16), Visibility(causal=causal))


@pytest.mark.parametrize("times", [torch.arange(38), torch.arange(38) // 5])
@pytest.mark.parametrize("made", [hourglass, document])
def test_nothing_comes_from_a_later_time(made, times: Tensor) -> None:
    layer, tokens = made(), packed_tokens({0: 38}, 1, 16)
    tokens.position[0, :, 0] = times
    x = tokens.x.double().requires_grad_()
    out = layer(tokens.with_x(x), None, Sights(tokens, tokens, CAUSAL), None).x
    for token in (4, 17, 30):
        (gradient,) = torch.autograd.grad(out[0, token].sum(), x, retain_graph=True)
        reached = gradient[0].abs().amax(-1) > 0
        assert not reached[times > times[token]].any()
        assert reached[:token].float().mean() > 0.7


def test_they_stand_among_layers_and_as_stages() -> None:
    tokens = packed_tokens({0: 9, 1: 20}, 2, 16)
    stack = Transformer(16, 3, [LAYER, partial(Hourglass, layers=[LAYER], factor=2), LAYER])
    for rule in (Visibility(), CAUSAL):
        assert stack(tokens, visibility=rule).x.shape == tokens.x.shape
    for stage in (hourglass().float(), document().float()):
        wanted = stage(tokens, None, Sights(tokens, tokens), None).x
        torch.testing.assert_close(stage(tokens).x, wanted)


def test_cost_of_a_document_grows_little_faster_than_its_length() -> None:
    layer = Mixer(Document(8, [partial(Block, attention=partial(Attention, num_heads=1))], [LAYER_LINEAR], 64))
    assert flops(layer, 4096, 8) <= 2.05 * flops(layer, 2048, 8)


LAYER_LINEAR = partial(Block, attention=partial(LinearAttention, num_heads=1))


def test_what_they_cannot_do_they_refuse() -> None:
    tokens = packed_tokens({0: 3}, 1, 16)
    for made, name in ((hourglass, "an hourglass"), (document, "a document of chunks")):
        with pytest.raises(ValueError, match=f"{name} cannot honour .*window=2"):
            made()(tokens, None, Sights(tokens, tokens, Visibility(window=2)), None)
        stack = Transformer(16, 1, [lambda dim, made=made: made().float()])
        with pytest.raises(ValueError, match=f"{name} keeps no memory"):
            stack(tokens, visibility=CAUSAL, memory=Memory("text"))
        empty = packed_tokens({}, 3, 16)
        assert made().float()(empty).x.shape == (1, 0, 16)
    with pytest.raises(ValueError, match="a factor of 1 does not shorten"):
        Hourglass(16, [LAYER], 1)
