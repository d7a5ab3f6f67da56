from __future__ import annotations

import pytest
import torch

from mmformer.checkpoints.changes import (
    Chain,
    ConvolutionPatches,
    Copied,
    GridPositions,
    Joined,
    Permuted,
    Reshaped,
    Rows,
    Same,
    Split,
    Transposed,
)

CHANGES = [
    (Same(), [(3, 5)], [(3, 5)]),
    (Rows(), [(3, 5)], [(3, 5)]),
    (Transposed(), [(3, 5)], [(5, 3)]),
    (Transposed(), [(3,)], [(3,)]),
    (Joined(), [(3, 5)] * 3, [(9, 5)]),
    (Joined((4, 1, 1)), [(8, 5), (2, 5), (2, 5)], [(12, 5)]),
    (Split((1, 2)), [(9, 5)], [(3, 5), (6, 5)]),
    (Reshaped((1, 1, -1), (1, -1)), [(1, 1, 5)], [(1, 5)]),
    (Permuted((0, 1, 3, 2)), [(4, 1, 3, 2)], [(4, 1, 2, 3)]),
    (Permuted((2, 0, 1)), [(4, 1, 3)], [(3, 4, 1)]),
    (Copied(2), [(3, 5)], [(3, 5), (3, 5)]),
    (ConvolutionPatches((3, 2)), [(5, 4, 3, 2)], [(5, 24)]),
    (ConvolutionPatches((3, 2), swapped=True), [(5, 4, 3, 2)], [(5, 24)]),
    (GridPositions(num_class=2, grid=(3, 2)), [(1, 8, 5)], [(2, 5), (3, 2, 5)]),
    (GridPositions(num_class=1, grid=(3, 2), swapped=True), [(1, 7, 5)], [(1, 5), (2, 3, 5)]),
    (GridPositions(num_class=0, batched=False), [(9, 5)], [(3, 3, 5)]),
    (Chain((Transposed(), Split((1, 2)))), [(5, 9)], [(3, 5), (6, 5)]),
]


@pytest.mark.parametrize(("change", "theirs", "ours"), CHANGES, ids=lambda value: type(value).__name__)
def test_saving_undoes_loading_and_shapes_are_known_without_numbers(change, theirs, ours):
    given = tuple(torch.randn(shape) for shape in theirs)
    made = change.load(given)
    assert [tuple(tensor.shape) for tensor in made] == ours
    assert [tuple(t.shape) for t in change.load(tuple(t.to("meta") for t in given))] == ours
    back = change.save(made)
    assert len(back) == len(given)
    for tensor, original in zip(back, given, strict=True):
        assert torch.equal(tensor, original)


def test_patches_of_a_convolution_are_those_of_a_linear_map():
    convolution = torch.nn.Conv2d(3, 5, (4, 2), stride=(4, 2))
    (weight,) = ConvolutionPatches((4, 2)).load((convolution.weight,))
    picture = torch.randn(8, 6, 3)
    patches = picture.view(2, 4, 3, 2, 3).transpose(1, 2).reshape(6, -1)
    expected = convolution(picture.permute(2, 0, 1)[None])[0].flatten(1).t()
    torch.testing.assert_close(patches @ weight.t() + convolution.bias, expected)


def test_a_swapped_kernel_reads_the_swapped_plane():
    convolution = torch.nn.Conv2d(1, 5, (4, 2), stride=(4, 2))  # mel bins by frames
    (weight,) = ConvolutionPatches((4, 2), swapped=True).load((convolution.weight,))
    plane = torch.randn(6, 8)  # frames by mel bins
    patches = plane.view(3, 2, 2, 4).transpose(1, 2).reshape(6, -1)
    expected = convolution(plane.t()[None, None])[0]  # 5, mel patches, frame patches
    torch.testing.assert_close(patches @ weight.t() + convolution.bias, expected.transpose(1, 2).flatten(1).t())


def test_zero_source_takes_its_share():
    (joined,) = Joined().load((torch.ones(4), None, torch.ones(4)))
    assert joined.tolist() == [1] * 4 + [0] * 4 + [1] * 4


def test_positions_are_resized_on_the_grid_alone():
    change = GridPositions(num_class=1)
    tokens, grid = change.load((torch.randn(1, 1 + 16, 6),))
    wanted = torch.empty(5, 7, 6)
    resized = change.resize(grid, wanted)

    # Bicubic weights of one axis (Keys, a = -0.75) by hand: separable, centres aligned, edges repeated.
    def axis(old: int, new: int) -> torch.Tensor:
        weights = torch.zeros(new, old)
        for i in range(new):
            x = (i + 0.5) * old / new - 0.5
            for j in range(int(x // 1) - 1, int(x // 1) + 3):
                d, a = abs(x - j), -0.75
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
                weights[i, min(max(j, 0), old - 1)] += w
        return weights

    expected = torch.einsum("ri,cj,ijd->rcd", axis(4, 5), axis(4, 7), grid)
    torch.testing.assert_close(resized, expected, atol=1e-5, rtol=1e-5)
    assert change.resize(grid.to("meta"), wanted).shape == wanted.shape
    with pytest.raises(ValueError, match="only the rows and columns"):
        change.resize(tokens, torch.empty(2, 6))


@pytest.mark.parametrize("size", [(6, 6), (4, 4)])
def test_positions_and_patches_are_resized_as_timm_does(size):
    layers = pytest.importorskip("timm.layers", reason="the oracle of resizing is timm")
    weight = torch.randn(5, 3, 8, 8)
    expected = layers.resample_patch_embed(weight, list(size))
    change = ConvolutionPatches((8, 8))
    ours = change.resize(change.load((weight,))[0], torch.empty(5, 3 * size[0] * size[1]))
    torch.testing.assert_close(ours, ConvolutionPatches(size).load((expected,))[0], atol=1e-4, rtol=1e-4)
    table = torch.randn(1, 1 + 25, 6)
    expected = layers.resample_abs_pos_embed(table, list(size), antialias=False)
    tokens, grid = GridPositions().load((table,))
    resized = GridPositions().resize(grid, torch.empty(*size, 6))
    torch.testing.assert_close(GridPositions().save((tokens, resized))[0], expected)


def test_more_rows_keep_their_own_and_fewer_take_the_first():
    old, new = torch.randn(3, 2), torch.randn(5, 2)
    grown = Rows().resize(old, new)
    assert torch.equal(grown[:3], old)
    assert torch.equal(grown[3:], new[3:])
    assert torch.equal(Rows().resize(new, old), new[:3])
    with pytest.raises(ValueError, match="only the number of rows"):
        Rows().resize(old, torch.randn(5, 3))


@pytest.mark.parametrize(
    ("change", "shapes", "message"),
    [
        (Joined(), [(3, 5), (3, 4), (3, 5)], r"\(3, 4\) beside \(3, 5\): \(3, 5\) would fit"),
        (Joined((4, 1, 1)), [(6, 5), (2, 5), (2, 5)], "6 rows do not divide into 4 parts"),
        (Split((1, 2)), [(10, 5)], "10 rows do not divide into 3 parts"),
        (Transposed(), [(3, 5, 1)], "3 axes"),
        (Reshaped((1, 1, -1), (1, -1)), [(1, 5)], r"\(1, 5\) in the file, where \(1, 1, -1\) belongs"),
        (ConvolutionPatches((4, 4)), [(5, 3, 4, 2)], "where patches of"),
        (GridPositions(), [(1, 8, 5)], "8 positions, not 1 and a grid of 2 x 2"),
        (GridPositions(), [(8, 5)], r"where \(1, N, D\) belongs"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change, shapes, message):
    with pytest.raises(ValueError, match=message):
        change.load(tuple(torch.empty(shape, device="meta") for shape in shapes))


def test_copies_that_were_trained_apart_do_not_go_back():
    with pytest.raises(ValueError, match="trained apart"):
        Copied().save((torch.zeros(2), torch.ones(2)))
