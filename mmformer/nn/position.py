"""Where a token is, as a vector to add or a rotation to apply."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

AXES = {"time": 0, "row": 1, "column": 2}


class Learned(nn.Module):
    """A learned vector for each place on one axis of the position; places past the last share it.

    The first `offset` vectors belong to no place (2 in RoBERTa and OPT).

    Raises:
        ValueError: an axis that is not time, row or column.
    """

    def __init__(self, dim: int, num_positions: int, axis: str = "time", offset: int = 0):
        super().__init__()
        self.axis, self.offset = _axis(axis), offset
        self.table = nn.Embedding(num_positions, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, position: Int[Tensor, "*B 3"]) -> Float[Tensor, "*B D"]:
        return self.table((position[..., self.axis] + self.offset).clamp(0, self.table.num_embeddings - 1))


class LearnedGrid(nn.Module):
    """The sum of a learned vector for each axis: pictures of any size and aspect ratio (NaViT, arXiv 2307.06304)."""

    def __init__(self, dim: int, num_positions: int, axes: Sequence[str] = ("row", "column")):
        super().__init__()
        self.parts = nn.ModuleList(Learned(dim, num_positions, axis) for axis in axes)

    def forward(self, position: Int[Tensor, "*B 3"]) -> Float[Tensor, "*B D"]:
        return torch.stack([part(position) for part in self.parts]).sum(0)


class GridTable(nn.Module):
    """A learned vector for each cell of a grid of a fixed size (ViT, arXiv 2010.11929).

    Raises:
        IndexError: a place outside the grid.
    """

    def __init__(self, dim: int, rows: int, columns: int, axes: Sequence[str] = ("row", "column")):
        super().__init__()
        self.axes = [_axis(axis) for axis in axes]
        self.table = nn.Parameter(torch.randn(rows, columns, dim) * 0.02)

    def forward(self, position: Int[Tensor, "*B 3"]) -> Float[Tensor, "*B D"]:
        row, column = (position[..., axis] for axis in self.axes)
        return self.table[row, column]


class Sinusoid(nn.Module):
    """Fixed sines and cosines of each axis, an equal share of the channels for each (arXiv 1706.03762, 3.5).

    Raises:
        ValueError: channels that do not divide by twice the number of axes.
    """

    rates: Tensor

    def __init__(self, dim: int, axes: Sequence[str] = ("time",), theta: float = 10_000.0):
        super().__init__()
        self.axes = [_axis(axis) for axis in axes]
        if dim % (2 * len(self.axes)):
            raise ValueError(f"{dim} channels do not divide into pairs for {len(self.axes)} axes: use a multiple")
        self.register_buffer("rates", _rates(dim // len(self.axes), theta), persistent=False)

    def forward(self, position: Int[Tensor, "*B 3"]) -> Float[Tensor, "*B D"]:
        angles = position[..., self.axes, None] * self.rates
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


class Rotary(nn.Module):
    """Rotate pairs of channels by the position (RoPE, arXiv 2104.09864), an equal share of them for each axis.

    Raises:
        ValueError: head channels that do not divide by twice the number of axes.
    """

    rates: Tensor

    def __init__(self, head_dim: int, axes: Sequence[str] = ("time",), theta: float = 10_000.0):
        super().__init__()
        self.axes = [_axis(axis) for axis in axes]
        if head_dim % (2 * len(self.axes)):
            raise ValueError(f"{head_dim} head channels do not divide into pairs for {len(self.axes)} axes")
        self.register_buffer("rates", _rates(head_dim // len(self.axes), theta), persistent=False)

    def forward(self, x: Float[Tensor, "B T H d"], position: Int[Tensor, "B T 3"]) -> Float[Tensor, "B T H d"]:
        angles = (position[..., self.axes, None] * self.rates).flatten(-2)[:, :, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _rates(channels: int, theta: float) -> Float[Tensor, " c"]:
    return torch.exp(-math.log(theta) * torch.arange(0, channels, 2) / channels)


def _axis(name: str) -> int:
    if name not in AXES:
        raise ValueError(f"axis {name!r}: a position has the axes {', '.join(AXES)}")
    return AXES[name]
