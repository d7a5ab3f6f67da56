"""A layer that is computed again gives the gradients of one that is kept, dropout included, and keeps less."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mmformer.nn import (
    AdaptiveSpan,
    Attention,
    Block,
    ByModality,
    CrossAttention,
    DeformableAttention,
    FeedForward,
    HierarchicalAttention,
    LinearAttention,
    Mamba2,
    MultiwayAttention,
    RelativeBias,
    Rotary,
    Routed,
    SwinAttention,
    Transformer,
)
from mmformer.nn.recompute import Recompute, recomputing
from mmformer.tokens import Tokens, merge, to_padded
from mmformer.visibility import Visibility
from tests.helpers import packed_tokens, scramble

DIM = 16
WAYS = [Recompute(), Recompute(every=2), Recompute(keep_products=True), Recompute(every=3, keep_products=True)]
MIXERS = {
    "full": partial(Attention, num_heads=2),
    "rotary and grouped": partial(Attention, num_heads=2, num_kv_heads=1, rotary=Rotary),
    "window": partial(Attention, num_heads=2, visibility=Visibility(window=2)),
    "span": partial(AdaptiveSpan, num_heads=2, max_span=4),
    "deformable": partial(DeformableAttention, num_heads=2, levels=2, points=2),
    "hierarchical": partial(HierarchicalAttention, num_heads=2, block=4, summaries=2),
    "linear": partial(LinearAttention, num_heads=2),
    "state space": partial(Mamba2, state=4, head_dim=8),
    "multiway": partial(MultiwayAttention, num_heads=2, modalities=["text"]),
    "routed": partial(Attention, num_heads=2, kernel=Routed(size=4, top=2)),
    "biased": partial(Attention, num_heads=2, kernel=RelativeBias(2)),
    "swin": partial(SwinAttention, num_heads=2, window=2),
}


def rows(padded: bool = False) -> Tokens:
    text, image = packed_tokens({0: 5, 1: 3, 2: 9}, 3, DIM), packed_tokens({0: 4, 2: 4}, 3, DIM, "image", seed=1)
    image.position[0, :, 1] = torch.arange(8) % 4 // 2
    tokens = merge([text, image])
    return to_padded(tokens) if padded else tokens


def stack(attention=MIXERS["full"], depth: int = 3, repeat: int = 1, **options) -> Transformer:
    layer = partial(Block, attention=attention, dropout=0.2, **options)
    built = Transformer(DIM, depth, [layer], repeat=repeat)
    scramble(built)
    return built


def step(module: Transformer, way: Recompute | None, tokens: Tokens, context: Tokens | None = None):
    """The outcome and every gradient of one pass."""
    torch.manual_seed(3)
    module.recompute = way
    module.zero_grad()
    x = tokens.x.clone().requires_grad_()
    out = module(tokens.with_x(x), context).x
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert x.grad is not None
    return [out, x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


def same(module: Transformer, way: Recompute, *given) -> None:
    for found, expected in zip(step(module, way, *given), step(module, None, *given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_gradients_are_those_of_what_is_kept(way, padded):
    same(stack(), way, rows(padded))


@pytest.mark.parametrize("keep_products", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_can_be_computed_again(mixer, keep_products):
    same(stack(MIXERS[mixer], depth=2), Recompute(keep_products=keep_products), rows())


@pytest.mark.parametrize("way", WAYS)
def test_shared_layers_experts_and_cross_attention_too(way):
    context = packed_tokens({0: 3, 2: 6}, 3, DIM, "audio", seed=2)
    experts = partial(ByModality, part=FeedForward, modalities=["image"])
    same(stack(cross=partial(CrossAttention, num_heads=2), feedforward=experts, repeat=2), way, rows(), context)


@pytest.mark.parametrize("way", WAYS)
def test_in_bf16(way):
    with torch.autocast("cpu", torch.bfloat16):
        same(stack(repeat=2), way, rows())


def kept(module: Transformer, way: Recompute | None) -> int:
    """Bytes that the forward pass keeps for the gradient, but for the parameters."""
    sizes: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = packed_tokens({0: 200, 1: 100}, 2, DIM)
    module.recompute = way
    with saved_tensors_hooks(note, lambda t: t):
        _hold = module(tokens.with_x(tokens.x.clone().requires_grad_()))
    return sum(sizes.values())


def test_it_keeps_less():
    module = stack(depth=4)
    whole, every_second, none = kept(module, None), kept(module, Recompute(every=2)), kept(module, Recompute())
    assert none < 0.1 * whole
    assert 0.4 * whole < every_second < 0.6 * whole


class Products(TorchDispatchMode):
    """How often each kind of product runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def products(way: Recompute | None) -> Counter[str]:
    with Products() as mode:
        step(stack(), way, rows())
    return mode.found


def test_kept_products_are_not_computed_again():
    plain, whole, selective = products(None), products(Recompute()), products(Recompute(keep_products=True))
    assert whole["addmm"] == 2 * plain["addmm"] > 0
    assert selective["addmm"] == plain["addmm"]
    assert selective["gelu"] == whole["gelu"] == 2 * plain["gelu"] > 0
    assert not recomputing()


def test_an_evaluation_computes_nothing_again():
    module = stack().eval()
    module.recompute = Recompute()
    assert kept(module, Recompute()) == kept(module, None)


def test_every_must_be_a_number_of_layers():
    with pytest.raises(ValueError, match="every=0: 1 computes every layer again"):
        Recompute(every=0)
