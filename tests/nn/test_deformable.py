"""Deformable attention is transformers' on equal pictures, and each grid by itself on unequal ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from mmformer.nn import Block, Transformer
from mmformer.nn.deformable import DeformableAttention, Pyramid, gather
from mmformer.nn.grids import grids
from mmformer.nn.memory import Memory
from mmformer.tokens import Tokens, merge, to_padded
from mmformer.visibility import Sights, Visibility
from tests.helpers import packed_tokens, scramble
from tests.nn.mixing import LENGTHS, assert_same_in_all_layouts, gradients, pictures, run, texts

SHAPES = {0: (6, 8), 3: (1, 5), 1: (7, 3), 2: (1, 1)}


def mixer(levels: int = 2, points: int = 3) -> DeformableAttention:
    return scramble(DeformableAttention(16, 4, levels, points)).double()


def reference(layer: DeformableAttention, maps: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """Pictures of one size (B, h, w, D) through transformers' layer, whose levels are means of the first."""
    module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr", reason="the oracle")
    (height, width), heads = shapes[0], layer.heads
    rows = maps.flatten(1, 2)
    value = layer.value(rows).view(len(maps), height, width, -1).permute(0, 3, 1, 2)
    pooled = [torch.nn.functional.avg_pool2d(value, 2**level) for level in range(layer.levels)]
    value = torch.cat([level.flatten(2).transpose(1, 2) for level in pooled], 1).unflatten(-1, (heads, -1))
    y, x = torch.meshgrid(torch.arange(height).to(rows) + 0.5, torch.arange(width).to(rows) + 0.5, indexing="ij")
    centre = torch.stack([x / width, y / height], -1).view(1, -1, 1, 1, 1, 2)
    offsets = layer.offsets(rows).view(*rows.shape[:2], heads, layer.levels, layer.points, 2)
    scale = torch.tensor([[w, h] for h, w in shapes]).view(1, 1, 1, -1, 1, 2)
    weights = layer.weights(rows).unflatten(-1, (heads, -1)).softmax(-1).view(offsets.shape[:-1])
    attention = module.MultiScaleDeformableAttention()
    where = centre + offsets / scale
    return layer.out(attention(value, torch.tensor(shapes), shapes, None, where, weights, 64)).view(maps.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_that_of_transformers_on_pictures_of_one_size(dtype: torch.dtype) -> None:
    layer, tokens = mixer(3).to(dtype), pictures({0: (8, 12), 1: (8, 12)}, 16)
    x = tokens.x.to(dtype).requires_grad_()
    ours = layer(tokens.with_x(x), None, Sights(tokens.with_x(x), tokens))
    theirs = reference(layer, x.view(2, 8, 12, 16), [(8, 12), (4, 6), (2, 3)]).view_as(ours)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    inputs = [x, *layer.parameters()]
    for got, wanted in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance * 10, atol=tolerance * 10)


@pytest.mark.parametrize("axes", [(1, 2), (0, 2)], ids=["picture", "spectrogram"])
def test_layouts_agree_on_grids_of_unequal_sizes(axes: tuple[int, int]) -> None:
    assert_same_in_all_layouts(mixer(3), pictures(SHAPES, 16, axes))


def test_layouts_agree_on_texts_and_on_merged_streams() -> None:
    assert_same_in_all_layouts(mixer(), texts(LENGTHS, 16))
    text, image = packed_tokens({0: 4, 2: 9}, 4, 16), pictures({0: (4, 4), 1: (2, 5), 2: (5, 5)}, 16)
    assert_same_in_all_layouts(mixer(), merge([image, text.with_x(text.x.double())], sequential=True))


def test_a_text_is_sampled_along_time_alone() -> None:
    """Bilinear in one dimension, by its formula."""
    layer, tokens = mixer(1, 2), texts({0: 23}, 16)
    x = tokens.x[0, :23]
    value = layer.value(x).unflatten(-1, (4, 4))
    offset = layer.offsets(x).view(23, 4, 2, 2)[..., 1]
    weight = layer.weights(x).view(23, 4, 2).softmax(-1)
    at = torch.arange(23)[:, None, None] + offset
    hat = (1 - (at[..., None] - torch.arange(23)).abs()).clamp(min=0)
    wanted = layer.out(torch.einsum("qhp,qhpk,khc->qhc", weight, hat, value).flatten(1))
    torch.testing.assert_close(layer(tokens, None, Sights(tokens, tokens))[0, :23], wanted)


def test_grids_are_what_was_merged() -> None:
    text = packed_tokens({0: 3, 1: 2}, 2, 4)
    first, second = (pictures({0: (2, 3)}, 4, seed=seed).with_x(torch.zeros(1, 6, 4)) for seed in (1, 2))
    layouts = [tokens.layout for tokens in (first, second)]
    assert all(layouts)
    for tokens in (first, second):
        object.__setattr__(tokens.layout, "num_samples", 2)
    found = grids(merge([first, second, text], sequential=True))
    sizes = list(zip(found.height.tolist(), found.width.tolist(), strict=True))
    assert sorted(sizes) == [(2, 1), (2, 3), (2, 3), (3, 1)]
    spectrogram = grids(pictures({0: (4, 3)}, 4, axes=(0, 2)))
    assert (spectrogram.height.tolist(), spectrogram.width.tolist()) == ([4], [3])


def test_cells_left_out_are_zero_and_too_many_of_them_an_error() -> None:
    whole, layer = pictures({0: (6, 6)}, 16), mixer(1)
    kept = torch.tensor([i for i in range(36) if i not in (3, 17, 20)])
    tokens = Tokens(
        x=whole.x[:, kept],
        modality=whole.modality[:, kept],
        position=whole.position[:, kept],
        segment=torch.zeros(1, len(kept), dtype=torch.long),
    )
    blank = whole.x.clone()
    with torch.no_grad():
        layer.value.bias.zero_()
    blank[:, [3, 17, 20]] = 0
    wanted = layer(whole.with_x(blank), None, Sights(whole, whole))[:, kept]
    torch.testing.assert_close(layer(tokens, None, Sights(tokens, tokens)), wanted)
    far = packed_tokens({0: 3}, 1, 16)
    far.position[0, 2, 0] = 1000
    with pytest.raises(ValueError, match="positions of 3 tokens span grids of 1001 cells"):
        layer.float()(far, None, Sights(far, far))


def test_places_stay_exact_in_long_rows() -> None:
    """Half a cell off, at the far end of 20,000 tokens, in single precision."""
    values = torch.randn(20_001, 1, 2)
    last = 19_990
    pyramid = Pyramid(
        cell=torch.zeros(1, 1, dtype=torch.long),
        count=torch.ones(20_001, dtype=torch.long),
        first=torch.zeros(1, 1, dtype=torch.long),
        size=torch.tensor([[[20_000, 1]]]),
        whole=torch.tensor([[[last, 0]]]),
        part=torch.zeros(1, 1, 2),
        free=torch.tensor([[0, 1]]),
    )
    offsets = torch.tensor([0.0, 0.1]).view(1, 1, 1, 1, 2)
    got = gather(values, pyramid, offsets, torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(got[0, 0], 0.9 * values[last, 0] + 0.1 * values[last + 1, 0], rtol=1e-6, atol=1e-6)


def test_half_precision_is_near() -> None:
    layer, tokens = mixer(), pictures(SHAPES, 16)
    wanted = layer(tokens, None, Sights(tokens, tokens))
    half = tokens.with_x(tokens.x.bfloat16())
    got = layer.bfloat16()(half, None, Sights(half, half))
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_values_looked_up_grow_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = []
    bag = torch.nn.functional.embedding_bag
    monkeypatch.setattr(
        torch.nn.functional, "embedding_bag", lambda i, *a, **k: looked_up.append(i.numel()) or bag(i, *a, **k)
    )
    layer = DeformableAttention(16, 4, 3, 2)
    for length in (1000, 2000):
        tokens = packed_tokens({0: length}, 1, 16)
        layer(tokens, None, Sights(tokens, tokens))
    assert looked_up == [1000 * 4 * 3 * 2 * 4, 2000 * 4 * 3 * 2 * 4]


def test_what_it_cannot_do_it_refuses() -> None:
    layer, tokens = DeformableAttention(16, 4, 1, 2), packed_tokens({0: 3}, 1, 16)
    for rule in (Visibility(causal=True), Visibility(window=2), Visibility(sees={"text": ["image"]})):
        with pytest.raises(ValueError, match=r"deformable attention cannot honour .* take mmformer.nn.Attention"):
            layer(tokens, None, Sights(tokens, tokens, rule))
    stack = Transformer(16, 1, [partial(Block, attention=lambda dim: layer)])
    with pytest.raises(ValueError, match="deformable attention keeps no memory"):
        stack(tokens, memory=Memory("text"))
    for empty in (packed_tokens({}, 3, 16), to_padded(packed_tokens({}, 3, 16))):
        assert run(layer, empty)[0] == {}
