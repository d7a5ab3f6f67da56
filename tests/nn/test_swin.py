"""Windows on grids are transformers' Swin where their windows fit, and dense attention within each window elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmformer.nn.swin import PatchMerging, SwinAttention
from mmformer.tokens import Tokens, merge, to_padded
from mmformer.visibility import Sights, Visibility
from tests.helpers import packed_tokens, scramble
from tests.nn.mixing import assert_same_in_all_layouts, flops, gaps, gradients, pictures, texts

SHAPES = {0: (6, 8), 3: (3, 9), 1: (7, 3), 2: (1, 1)}


def mixer(window: int = 4, shift: int = 0) -> SwinAttention:
    return scramble(SwinAttention(16, 4, window, shift)).double()


def theirs(layer: SwinAttention, maps: Tensor) -> Tensor:
    """Pictures (B, h, w, D) through transformers' windowed attention with the same weights."""
    module = pytest.importorskip("transformers.models.swin.modeling_swin", reason="the oracle")
    config = module.SwinConfig(window_size=layer.window, qkv_bias=True, attn_implementation="eager")
    _, height, width, dim = maps.shape
    swin = module.SwinLayer(config, dim, (height, width), layer.heads, 0.0, layer.shift).to(maps.dtype)
    attention, names = swin.attention, ("q_proj", "k_proj", "v_proj")
    moved, mask = swin.cyclic_shift(maps), swin.get_attn_mask(height, width, maps.dtype, maps.device)
    cells = module.window_partition(moved, layer.window).flatten(1, 2)
    weights = {f"{name}.weight": part for name, part in zip(names, layer.qkv.weight.chunk(3), strict=True)}
    weights |= {f"{name}.bias": part for name, part in zip(names, layer.qkv.bias.chunk(3), strict=True)}
    weights |= {"o_proj.weight": layer.out.weight, "o_proj.bias": layer.out.bias}
    weights |= {"relative_position_bias.relative_position_bias_table": layer.table}
    out, _ = torch.func.functional_call(attention, weights, (cells, mask))
    rows = module.window_reverse(out.unflatten(1, (layer.window, -1)), layer.window, height, width)
    return swin.cyclic_shift(rows, reverse=True)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_that_of_transformers_forward_and_backward(shift: int, dtype: torch.dtype) -> None:
    layer, tokens = mixer(4, shift).to(dtype), pictures({0: (8, 12), 1: (8, 12)}, 16)
    x = tokens.x.to(dtype).requires_grad_()
    ours = layer(tokens.with_x(x), None, Sights(tokens, tokens))
    wanted = theirs(layer, x.view(2, 8, 12, 16)).view_as(ours)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)  # their softmax is in single precision always
    inputs = [x, *layer.parameters()]
    for got, expected in zip(gradients(ours, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def slow(layer: SwinAttention, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """One grid, all pairs: who is in whose window, and the table's number for how far apart they are."""
    shifts = [layer.shift if int(place.max()) >= layer.window else 0 for place in (rows, columns)]
    sides = [
        (place - shift + layer.window) // layer.window for place, shift in zip((rows, columns), shifts, strict=True)
    ]
    same = (sides[0][:, None] == sides[0]) & (sides[1][:, None] == sides[1])
    apart = [(place[:, None] - place + layer.window - 1).clamp(0, 2 * layer.window - 2) for place in (rows, columns)]
    bias = layer.table[apart[0] * (2 * layer.window - 1) + apart[1]]
    q, k, v = layer.qkv(x).view(len(x), 3, layer.heads, -1).unbind(1)
    scores = torch.einsum("qhd,khd->qkh", q, k) / q.shape[-1] ** 0.5 + bias
    weights = scores.masked_fill(~same[..., None], -torch.inf).softmax(1)
    return layer.out(torch.einsum("qkh,khd->qhd", weights, v).flatten(1))


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_it_is_dense_attention_in_windows_of_grids_of_any_size(shift: int) -> None:
    layer, tokens = mixer(4, shift), pictures(SHAPES, 16)
    got = layer(tokens, None, Sights(tokens, tokens))
    for sample in SHAPES:
        own = tokens.sample() == sample
        rows, columns = tokens.position[own][:, 1:].unbind(-1)
        torch.testing.assert_close(got[own], slow(layer, tokens.x[own], rows, columns))


@pytest.mark.parametrize("shift", [0, 1])
def test_layouts_agree(shift: int) -> None:
    assert_same_in_all_layouts(mixer(4, shift), pictures(SHAPES, 16))
    assert_same_in_all_layouts(mixer(4, shift), pictures(SHAPES, 16, axes=(0, 2)))
    text, image = packed_tokens({0: 4, 2: 9}, 4, 16), pictures({0: (4, 4), 1: (2, 5), 2: (5, 5)}, 16)
    merged = merge([image, text.with_x(text.x.double())], sequential=True)
    assert_same_in_all_layouts(mixer(4, shift), merged)


def test_cost_grows_with_the_picture() -> None:
    small, large = pictures({0: (64, 128)}, 8), pictures({0: (128, 128)}, 8)
    layer = SwinAttention(8, 1, 8, 4).double()
    assert flops(layer, 0, 8, tokens=large) == 2 * flops(layer, 0, 8, tokens=small)


def merged_slowly(stage: PatchMerging, x: Tensor) -> Tensor:
    """One grid (h, w, D): four neighbours joined column by column, zeros beyond the edge."""
    x = torch.nn.functional.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
    joined = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)
    return stage.reduction(stage.norm(joined)).flatten(0, 1)


def test_merging_is_that_of_the_formula_and_of_transformers() -> None:
    module = pytest.importorskip("transformers.models.swin.modeling_swin", reason="the oracle")
    stage, tokens = scramble(PatchMerging(16, 32)).double(), pictures(SHAPES, 16)
    theirs = module.SwinPatchMerging(16).double()
    theirs.load_state_dict(stage.state_dict())
    packed, padded = stage(tokens), stage(to_padded(tokens))
    assert packed.layout is not None
    assert packed.layout.lengths == (12, 10, 8, 1)
    for sample, (height, width) in SHAPES.items():
        x = tokens.x[tokens.sample() == sample].view(height, width, 16)
        wanted = merged_slowly(stage, x)
        torch.testing.assert_close(packed.x[packed.sample() == sample], wanted)
        torch.testing.assert_close(theirs(x.view(1, height * width, 16), (height, width))[0], wanted)
        for field in ("x", "position", "modality"):
            values = [getattr(t, field)[t.sample() == sample] for t in (packed, padded, stage(gaps(to_padded(tokens))))]
            torch.testing.assert_close(values[1], values[0])
            torch.testing.assert_close(values[2], values[0])
    place = packed.position[packed.sample() == 0]
    assert place.tolist() == [[0, row, column] for row in range(3) for column in range(4)]


def test_a_text_is_merged_in_pairs_from_where_it_starts() -> None:
    stage, tokens = PatchMerging(16, 16).double(), texts({0: 5, 1: 2}, 16)
    tokens.position[..., 0] += 10
    merged: Tokens = stage(tokens)
    assert merged.layout is not None
    assert merged.layout.lengths == (3, 1)
    assert merged.position[0, :, 0].tolist() == [10, 11, 12, 10]


def test_what_it_cannot_do_it_refuses() -> None:
    tokens = packed_tokens({0: 3}, 1, 16)
    with pytest.raises(ValueError, match="windowed attention of grids cannot honour"):
        mixer().float()(tokens, None, Sights(tokens, tokens, Visibility(causal=True)))
    with pytest.raises(ValueError, match="a shift of 4 for windows of 4"):
        SwinAttention(16, 4, 4, 4)
    empty = packed_tokens({}, 3, 16)
    assert mixer().float()(empty, None, Sights(empty, empty)).shape == (1, 0, 16)
    assert PatchMerging(16, 8)(empty).x.shape == (1, 0, 8)


def test_half_precision_is_near() -> None:
    layer, tokens = mixer(4, 1), pictures(SHAPES, 16)
    wanted = layer(tokens, None, Sights(tokens, tokens))
    half = tokens.with_x(tokens.x.bfloat16())
    got = layer.bfloat16()(half, None, Sights(half, half))
    assert (got - wanted).norm() < 0.05 * wanted.norm()
