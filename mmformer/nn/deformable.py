"""Attention that learns where to look: a few points near each token, on grids of several resolutions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmformer.nn.chunks import is_causal, on, planned
from mmformer.nn.grids import Grids, grids
from mmformer.tokens import Tokens
from mmformer.visibility import Sights

INSTEAD = "points may lie anywhere, so take mmformer.nn.Attention for these layers"


class DeformableAttention(nn.Module):
    """Each token looks at `points` places near its own on each of `levels` grids (Deformable DETR, arXiv 2010.04159).

    The places are offsets that a linear map makes of the token, in cells, and their weights a softmax over another's
    output (equation 3). Values between cells are bilinear, and zero outside. Level l is the mean over 2^l x 2^l cells
    of the token's own grid: a picture (row, column), a spectrogram (time, column), a text or a sound (time). A merged
    sequence has a grid for each stretch of a modality, which sees itself alone: full layers between let them meet.

    Cost: T x levels x points x 4 values, whatever the length.

    Raises:
        ValueError: channels that do not divide by the heads; a rule, as of causality, or a memory.
    """

    def __init__(self, dim: int, num_heads: int, levels: int, points: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels do not divide by {num_heads} heads")
        self.heads, self.levels, self.points = num_heads, levels, points
        self.offsets = nn.Linear(dim, num_heads * levels * points * 2)
        self.weights = nn.Linear(dim, num_heads * levels * points)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self._initialise()

    def _initialise(self) -> None:
        """Point i of a head starts i + 1 cells away in the direction that is the head's, all with equal weight."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        reach = torch.arange(1, self.points + 1)[:, None]
        start = (direction[:, None, None] * reach).expand(-1, self.levels, -1, -1)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        with torch.no_grad():
            self.offsets.bias.copy_(start.flatten())

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights) -> Float[Tensor, "B T D"]:
        is_causal(sights, "deformable attention", INSTEAD, causal=False)
        pyramid = planned(sights, make_pyramid, self.levels)
        x = tokens.x.flatten(0, 1)
        cells = pyramid.pooled(self.value(x).unflatten(-1, (self.heads, -1)))
        offsets = self.offsets(x).unflatten(-1, (self.heads, self.levels, self.points, 2)).to(cells.dtype)
        weights = self.weights(x).unflatten(-1, (self.heads, -1)).softmax(-1, dtype=cells.dtype)
        offsets = offsets * pyramid.free[:, None, None, None]
        gathered = gather(cells, pyramid, offsets, weights.unflatten(-1, (self.levels, self.points)))
        return self.out(gathered.flatten(1).to(x.dtype).unflatten(0, tokens.segment.shape))


@dataclass(frozen=True, eq=False)
class Pyramid:
    """Grids of several resolutions, their cells end to end, and behind them one cell for padding.

    By level and token: `cell` is where it is pooled, `first` the first cell of its grid and `size` that grid's rows and
    columns; `whole` and `part` are the place of its centre (row, column) in cells, as an integer and the rest, so that
    long rows stay exact. `count` is how many tokens a cell has. `free` is 1 for axes (column, row) that have an extent.
    """

    cell: Int[Tensor, "L T"]
    count: Int[Tensor, " N"]
    first: Int[Tensor, "T L"]
    size: Int[Tensor, "T L 2"]
    whole: Int[Tensor, "T L 2"]
    part: Float[Tensor, "T L 2"]
    free: Int[Tensor, "T 2"]

    def pooled(self, values: Float[Tensor, "T h c"]) -> Float[Tensor, "N h c"]:
        """The mean of the values in each cell, in single precision at least."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        cells = values.new_zeros(len(self.count), *values.shape[1:])
        for cell in self.cell:
            cells = cells.index_add(0, cell, values)
        return cells / self.count.clamp(min=1)[:, None, None]


def make_pyramid(tokens: Tokens, levels: int) -> Pyramid:
    """The grids of a sequence and `levels` - 1 coarser ones, each half of the one before along axes above 1."""
    found, total, device = grids(tokens), tokens.segment.numel(), tokens.x.device
    made, count = [], 0
    for level in range(levels):
        made.append(_level(found, 2**level, count))
        count += int(made[-1].pop("cells").sum())

    def spread(values: np.ndarray, fill: int = 0) -> Tensor:
        """Values of the tokens that stand on grids, by all tokens."""
        out = np.full((total, *values.shape[1:]), fill, dtype=values.dtype)
        out[found.where] = values
        return on(out, device)

    parts = {name: np.stack([level[name] for level in made], 1) for name in made[0]}
    part = spread(parts["part"]).to(torch.promote_types(tokens.x.dtype, torch.float32))
    free = np.stack([found.width > 1, found.height > 1], -1).astype(np.int64)[found.grid]
    return Pyramid(
        cell=spread(parts["cell"], count).T,
        count=on(np.bincount(parts["cell"].flatten(), minlength=count + 1), device),
        first=spread(parts["first"]),
        size=spread(parts["size"]),
        whole=spread(parts["whole"]),
        part=part,
        free=spread(free),
    )


def _level(found: Grids, factor: int, start: int) -> dict[str, np.ndarray]:
    """What a `Pyramid` has of each token on grids `factor` times as coarse, whose cells follow `start` others.

    And `cells`, how many each grid has.
    """
    extent, place = np.stack([found.height, found.width], -1), np.stack([found.row, found.column], -1)
    factors = np.where(extent > 1, factor, 1)
    size = -(-extent // factors)
    cells = size.prod(-1)
    first = (start + cells.cumsum() - cells)[found.grid]
    factors, size = factors[found.grid], size[found.grid]
    row, column = (place // factors).T
    centre = (place + 0.5) / factors - 0.5
    whole = np.floor(centre).astype(np.int64)
    cell = first + row * size[:, 1] + column
    return {"cell": cell, "first": first, "size": size, "whole": whole, "part": centre - whole, "cells": cells}


def gather(
    cells: Float[Tensor, "N h c"],
    pyramid: Pyramid,
    offsets: Float[Tensor, "T h L p 2"],
    weights: Float[Tensor, "T h L p"],
) -> Float[Tensor, "T h c"]:
    """The weighted sum of the values at each token's places, `offsets` (column, row) cells from its own."""
    first, size, whole = (x[:, None, :, None] for x in (pyramid.first, pyramid.size, pyramid.whole))
    at = offsets.flip(-1) + pyramid.part.to(offsets.dtype)[:, None, :, None]
    floor = at.floor()
    share = at - floor
    corner = floor.long() + whole
    index, factor = [], []
    for step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        place = corner + corner.new_tensor(step)
        inside = ((place >= 0) & (place < size)).all(-1)
        cell = first + place[..., 0] * size[..., 1] + place[..., 1]
        near = [share[..., axis] if one else 1 - share[..., axis] for axis, one in enumerate(step)]
        index.append(torch.where(inside, cell, 0))
        factor.append(torch.where(inside, weights * near[0] * near[1], 0))
    heads, bags = cells.shape[1], (-1, 4 * weights.shape[2] * weights.shape[3])
    place = torch.stack(index, -1) * heads + torch.arange(heads, device=cells.device)[:, None, None, None]
    summed = F.embedding_bag(
        place.reshape(bags), cells.flatten(0, 1), mode="sum", per_sample_weights=torch.stack(factor, -1).reshape(bags)
    )
    return summed.unflatten(0, (-1, heads))
