from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from mmformer.batch import Ragged
from mmformer.encoders import LinearPatches, Normalize, PlaneEmbedder
from mmformer.nn import (
    Attention,
    BandScaling,
    ConvolutionPosition,
    LinearScaling,
    NormedRotary,
    PositionBeside,
    Rotary,
    SinusoidTable,
    StretchedGrid,
)
from mmformer.tokens import merge, to_padded
from tests.helpers import packed_tokens


def places(*times: int) -> torch.Tensor:
    position = torch.zeros(1, len(times), 3, dtype=torch.long)
    position[..., 0] = torch.tensor(times)
    return position


def test_rotated_scores_depend_on_the_distance_alone() -> None:
    rotary = Rotary(10)
    q, k = torch.randn(1, 1, 3, 10).expand(1, 4, 3, 10), torch.randn(1, 1, 3, 10).expand(1, 4, 3, 10)
    turned, _ = rotary(q, k, places(7, 3, 107, 5))
    _, others = rotary(q, k, places(5, 1, 105, 5))
    scores = (turned * others).sum(-1)[0]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0], scores[3])


def test_pairs_are_the_two_halves() -> None:
    q = torch.zeros(1, 1, 1, 4)
    q[..., 0] = 1
    turned, _ = Rotary(4, theta=100.0)(q, q, places(3))
    torch.testing.assert_close(turned[0, 0, 0], torch.tensor([math.cos(3), 0, math.sin(3), 0]))


def test_linear_scaling_brings_places_together() -> None:
    q, k = torch.randn(2, 1, 2, 3, 8)
    near = Rotary(8)(q, k, places(2, 5))
    far = Rotary(8, scaling=LinearScaling(4.0))(q, k, places(8, 20))
    torch.testing.assert_close(near, far)


def test_band_scaling_by_its_definition() -> None:
    """A channel that turns often within the original length stays, one that turns seldom is slowed, between a ramp."""
    scaling = BandScaling(factor=8.0, low=1.0, high=4.0, original=100)
    turns = torch.tensor([9.0, 4.0, 2.5, 1.0, 0.2])
    wanted = torch.tensor([1.0, 1.0, (0.5 / 8 + 0.5), 1 / 8, 1 / 8])
    rates = turns * 2 * math.pi / 100
    torch.testing.assert_close(scaling(rates) / rates, wanted)


def test_normed_rotary_normalises_before_it_turns() -> None:
    part = NormedRotary(6, norm=partial(nn.RMSNorm, eps=1e-6), rotary=partial(Rotary, theta=50.0))
    weights = [nn.init.normal_(part.get_parameter(f"{name}_norm.weight")) for name in ("query", "key")]
    q, k = torch.randn(1, 3, 4, 6), torch.randn(1, 3, 2, 6)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    wanted = part.rotary(normed(q, weights[0]), normed(k, weights[1]), places(0, 1, 2))
    torch.testing.assert_close(part(q, k, places(0, 1, 2)), wanted)


@pytest.mark.parametrize(
    ("bias", "found"),
    [(True, (True, True)), (False, (False, False)), ([True, False], (True, False)), ((False, True), (False, True))],
)
def test_attention_with_a_bias_in_both_maps_or_one(bias, found: tuple[bool, bool]) -> None:
    part = Attention(8, 2, bias=bias)
    assert (part.qkv.bias is not None, part.out.bias is not None) == found


@pytest.mark.parametrize(("kernel", "groups"), [(6, 3), (5, 1), (1, 2)])
def test_a_convolution_over_neighbours_is_that_of_torch_for_each_item_alone(kernel: int, groups: int) -> None:
    stage = ConvolutionPosition(6, kernel, groups)
    for parameter in stage.parameters():
        nn.init.normal_(parameter)
    reference = nn.utils.parametrizations.weight_norm(
        nn.Conv1d(6, 6, kernel, padding=kernel // 2, groups=groups), dim=2
    )
    held = {"original0": stage.scale, "original1": stage.direction}
    reference.load_state_dict({"bias": stage.bias} | {f"parametrizations.weight.{n}": t for n, t in held.items()})
    tokens = packed_tokens({3: 1, 0: 2, 1: 7, 4: 7}, 5, 6)
    expected = []
    for item in tokens.x[0].split(tokens.layout.lengths):
        found = reference(item.T[None])[..., : len(item)]
        expected.append(item + nn.functional.gelu(found[0].T))
    torch.testing.assert_close(stage(tokens).x[0], torch.cat(expected))
    padded = to_padded(tokens)
    real = padded.valid
    torch.testing.assert_close(to_padded(stage(tokens)).x[real], stage(padded).x[real])


def test_padding_behind_the_last_item_stays_as_it_is() -> None:
    stage, tokens = ConvolutionPosition(6, 4, 2), packed_tokens({0: 3, 1: 5}, 2, 6)
    wide = merge([tokens], multiple=16)
    found = stage(wide)
    assert torch.equal(found.x[:, 8:], wide.x[:, 8:])
    torch.testing.assert_close(found.x[:, :8], stage(tokens).x)
    empty = packed_tokens({}, 2, 6)
    assert stage(empty).x.shape == (1, 0, 6)


def test_whisper_s_sines_turn_from_1_to_a_ten_thousandth_a_place() -> None:
    table = SinusoidTable(10, 7)
    rates = torch.tensor([1.0, 0.1, 0.01, 0.001, 0.0001])
    place = places(0, 3, 6)
    wanted = torch.cat([torch.sin(place[..., :1] * rates), torch.cos(place[..., :1] * rates)], -1)
    torch.testing.assert_close(table(place), wanted)
    assert not list(table.parameters())


def test_a_grid_is_stretched_corner_to_corner_over_each_picture() -> None:
    embedder = PlaneEmbedder(
        2, LinearPatches(2, 1, (4, 4)), Normalize([0.0], [1.0]), modality="image", axes=("row", "column"),
        position=partial(StretchedGrid, rows=2, columns=3),
    )  # fmt: skip
    assert isinstance(embedder.position, StretchedGrid)
    table = embedder.position.table.detach()
    sizes = ((8, 12), (12, 20), (8, 12))
    with torch.no_grad():
        bias = embedder.stem.linear.bias
        tokens = embedder(Ragged.stack([torch.zeros(*size, 1) for size in sizes], [0, 1, 2], 1), 3)
        items = zip(tokens.layout.samples, tokens.x[0].split(tokens.layout.lengths), strict=True)
        found = {row: x - bias for row, x in items}
    for row in (0, 2):
        torch.testing.assert_close(found[row], table.flatten(0, 1))
    between = table[:, [0, 0, 1, 1, 2]] / 2 + table[:, [0, 1, 1, 2, 2]] / 2
    between = torch.stack([between[0], between.mean(0), between[1]])  # 3 rows and 5 columns over 2 and 3
    torch.testing.assert_close(found[1], between.flatten(0, 1))


def test_a_position_beside_leaves_the_channels_alone() -> None:
    tokens = packed_tokens({0: 3, 1: 2}, 2, 4)
    table = SinusoidTable(6, 5)
    out = PositionBeside(table)(tokens)
    assert torch.equal(out.x[..., :4], tokens.x)
    assert torch.equal(out.x[..., 4:], table(tokens.position))
