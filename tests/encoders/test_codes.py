"""Ids of a codec as inputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mmformer.batch import Ragged
from mmformer.encoders import CodeEmbedder, image_convolutions
from mmformer.nn import LearnedGrid, Sinusoid
from tests.helpers import random_batch

SIZES = (7, 5)


def grids(*shapes: tuple[int, int]) -> Ragged:
    draw = torch.Generator().manual_seed(0)
    items = [torch.stack([torch.randint(0, size, shape, generator=draw) for size in SIZES], -1) for shape in shapes]
    return Ragged.stack(items, range(len(items)), 1)


def test_a_cell_is_the_sum_of_its_codes_and_its_place():
    embedder = CodeEmbedder(8, SIZES, partial(LearnedGrid, num_positions=6))
    codes = grids((2, 3), (1, 2), (2, 3))
    tokens = embedder(codes, 3)
    assert tokens.layout is not None
    assert embedder.position is not None
    first, second = embedder.tables.parameters()
    start = 0
    for row, item in codes.items():
        for r in range(item.shape[0]):
            for c in range(item.shape[1]):
                wanted = first[item[r, c, 0]] + second[item[r, c, 1]]
                wanted = wanted + embedder.position(torch.tensor([0, r, c]))
                torch.testing.assert_close(tokens.x[0, start], wanted)
                assert tokens.position[0, start].tolist() == [0, r, c]
                assert int(tokens.sample()[0, start]) == row
                start += 1
    assert start == tokens.layout.total == tokens.x.shape[1]


def test_the_cells_of_a_sound_stand_in_time():
    codes = grids((3, 1), (2, 1))
    tokens = CodeEmbedder(8, SIZES, Sinusoid, modality="audio", axes=("time", "column"))(codes, 2)
    assert tokens.position[0].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0], [2, 0, 0]]


def test_positions_are_those_of_the_encoder_of_pictures():
    pictures = random_batch(14).inputs["image"]
    stem = image_convolutions(8, [4, 4], 3)
    cells = [torch.zeros(h // 4, w // 4, 2, dtype=torch.long) for h, w in pictures.shapes]
    codes = Ragged(
        values=torch.cat([cell.flatten(0, 1) for cell in cells]),
        shapes=tuple(tuple(cell.shape[:2]) for cell in cells),
        rows=pictures.rows,
    )
    ours, theirs = CodeEmbedder(8, SIZES)(codes, 14), stem(pictures, 14)
    assert torch.equal(ours.position, theirs.position)
    assert torch.equal(ours.segment, theirs.segment)
    assert torch.equal(ours.modality, theirs.modality)


def test_ids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 ids a cell for 1 codebooks"):
        CodeEmbedder(8, [7])(grids((2, 2)), 1)
    with pytest.raises(IndexError):  # an id of the second codebook is not taken for one of another
        CodeEmbedder(8, [7, 2])(grids((4, 4)), 1)
