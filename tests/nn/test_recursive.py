"""One layer for several: plain recursion at the start, the layers themselves at full rank, few parameters between."""

from functools import partial

import pytest
import torch
from torch import nn

from mmformer.nn import Attention, Block, CrossAttention, Looped, Recursive, Rotary, Transformer
from tests.helpers import packed_tokens, scramble

LAYER = partial(
    Block, attention=partial(Attention, num_heads=2, rotary=Rotary), cross=partial(CrossAttention, num_heads=2)
)
TOKENS, CONTEXT = packed_tokens({0: 5, 1: 3, 2: 1}, 3, 12), packed_tokens({0: 2, 2: 4}, 3, 12, "image", seed=1)


def stack(layers):
    """A Transformer around layers that are there already."""
    made = Transformer(12, 0, [], norm=None)
    made.layers = nn.ModuleList(layers)
    return made


def gradients(module):
    module(TOKENS, CONTEXT).x.square().sum().backward()
    return {name: p.grad for name, p in module.named_parameters()}


def test_a_new_one_is_its_layer_several_times_over():
    made = Recursive(12, LAYER, times=3, rank=2)
    looped = Looped(12, [LAYER], times=3)
    scramble(looped)
    made.shared.load_state_dict(looped.layers[0].state_dict())
    assert torch.equal(stack([made])(TOKENS, CONTEXT).x, stack([looped])(TOKENS, CONTEXT).x)
    ours, theirs = gradients(made_stack := stack([made])), gradients(stack([looped]))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name.replace("layers.0.layers.0.", "layers.0.shared.")], gradient)
    still = [name for name, p in made_stack.named_parameters() if p.grad is None]
    assert not still, "what gets no gradient would stop training over several processes"


@pytest.mark.parametrize("rank", [12, 99])
def test_at_full_rank_it_computes_what_the_layers_did(rank):
    layers = [scramble(LAYER(12), seed) for seed in range(3)]
    made = Recursive.from_layers(layers, rank, 12)
    torch.testing.assert_close(stack([made])(TOKENS, CONTEXT).x, stack(layers)(TOKENS, CONTEXT).x, rtol=1e-4, atol=1e-4)


def test_the_nearer_the_higher_the_rank():
    layers = [scramble(LAYER(12), seed) for seed in range(3)]
    weights = [layer.attention.qkv.weight for layer in layers]

    def distance(rank):
        made = Recursive.from_layers(layers, rank, 12)
        found = [relaxation(made.shared)["attention.qkv.weight"] for relaxation in made.passes]
        return sum((a - b).square().sum().item() for a, b in zip(found, weights, strict=True))

    distances = [distance(rank) for rank in (0, 2, 5, 12)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-8 < distances[-2]


def test_parameters_are_one_layer_and_what_the_passes_add():
    layer, made = LAYER(12), Recursive(12, LAYER, times=4, rank=1)
    matrices = [p for p in layer.parameters() if p.ndim == 2]
    added = sum(sum(p.shape) for p in matrices) + sum(p.numel() for p in layer.parameters() if p.ndim == 1)
    size = sum(p.numel() for p in layer.parameters())
    assert sum(p.numel() for p in made.parameters()) == size + 4 * added


def test_a_pass_trains_what_is_its_own():
    made = scramble(Recursive(12, LAYER, times=2, rank=2))
    twins = [relaxation.up["attention/out/weight"] for relaxation in made.passes]
    gradients(stack([made]))
    assert not torch.allclose(twins[0].grad, twins[1].grad)


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="0 passes at rank 2"):
        Recursive(12, LAYER, times=0, rank=2)
    with pytest.raises(ValueError, match="rank -1"):
        Recursive(12, LAYER, times=2, rank=-1)
