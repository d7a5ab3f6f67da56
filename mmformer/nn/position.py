"""Where a token is, as a vector to add or a rotation to apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmformer.tokens import Tokens

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


class StretchedGrid(nn.Module):
    """A learned vector for each cell of a grid, stretched corner to corner over other grids (ViLT, 2102.03334).

    It is called with the rows and columns of a whole item, not with single places.
    """

    def __init__(self, dim: int, rows: int, columns: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, columns, dim) * 0.02)

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "T D"]:
        planes = self.table.permute(2, 0, 1)[None]
        if grid != planes.shape[2:]:
            planes = nn.functional.interpolate(planes, grid, mode="bilinear", align_corners=True)
        return planes[0].permute(1, 2, 0).flatten(0, 1)


class PositionBeside(nn.Module):
    """A stage that puts a vector for where a token stands behind its channels, and adds it to none (Perceiver)."""

    by_token = True

    def __init__(self, position: nn.Module):
        super().__init__()
        self.position = position

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(torch.cat([tokens.x, self.position(tokens.position)], -1))


class Sinusoid(nn.Module):
    """Fixed sines and cosines of each axis, an equal share of the channels for each (arXiv 1706.03762, 3.5).

    `amplitude` should be about the size of what they are added to. Word vectors start at 0.02: under sines of 1 a model
    sees where a word stands long before it sees which word it is.

    Raises:
        ValueError: channels that do not divide by twice the number of axes.
    """

    rates: Tensor

    def __init__(self, dim: int, axes: Sequence[str] = ("time",), theta: float = 10_000.0, amplitude: float = 1.0):
        super().__init__()
        self.axes, self.amplitude = [_axis(axis) for axis in axes], amplitude
        if dim % (2 * len(self.axes)):
            raise ValueError(f"{dim} channels do not divide into pairs for {len(self.axes)} axes: use a multiple")
        self.register_buffer("rates", _rates(dim // len(self.axes), theta), persistent=False)

    def forward(self, position: Int[Tensor, "*B 3"]) -> Float[Tensor, "*B D"]:
        angles = position[..., self.axes, None] * self.rates
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2) * self.amplitude


class SinusoidTable(nn.Module):
    """A fixed vector for each place in time: Whisper's sines and cosines, or what a checkpoint holds (2212.04356).

    Raises:
        IndexError: a place past the last.
    """

    table: Tensor

    def __init__(self, dim: int, num_positions: int, theta: float = 10_000.0):
        super().__init__()
        rates = theta ** -torch.linspace(0, 1, dim // 2)  # Whisper's slowest one is 1 / theta
        angles = torch.arange(num_positions)[:, None] * rates
        self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], -1))

    def forward(self, position: Int[Tensor, "*B 3"]) -> Float[Tensor, "*B D"]:
        return self.table[position[..., AXES["time"]]]


class ConvolutionPosition(nn.Module):
    """A stage that adds to each token what a convolution over its neighbours gives (wav2vec 2.0, arXiv 2006.11477).

    No item sees another: beyond its ends it has zeros. The weight has a direction, and a scale for each of the `kernel`
    places (arXiv 1602.07868); an even kernel reaches one place further back than ahead.
    """

    def __init__(self, dim: int, kernel: int, groups: int, activation: Callable[[], nn.Module] = nn.GELU):
        super().__init__()
        self.groups = groups
        self.direction = nn.Parameter(torch.randn(dim, dim // groups, kernel) * 2 * (kernel * dim) ** -0.5)
        self.scale = nn.Parameter(self._norm().detach())
        self.bias = nn.Parameter(torch.zeros(dim))
        self.activation = activation()

    def forward(self, tokens: Tokens) -> Tokens:
        if tokens.layout is None:
            return tokens.with_x(tokens.x + self._convolve(tokens.x * tokens.valid[..., None]))
        runs = [(length, len(list(same))) for length, same in groupby(tokens.layout.lengths)]
        *parts, rest = tokens.x[0].split([*(length * count for length, count in runs), self._rest(tokens)])
        rows = [part.unflatten(0, (count, length)) for part, (length, count) in zip(parts, runs, strict=True)]
        added = [self._convolve(row).flatten(0, 1) for row in rows]
        return tokens.with_x(tokens.x + torch.cat([*added, torch.zeros_like(rest)])[None])

    def _convolve(self, x: Float[Tensor, "n t D"]) -> Float[Tensor, "n t D"]:
        weight = self.direction * (self.scale / self._norm())
        kernel = weight.shape[-1]
        out = nn.functional.conv1d(x.transpose(1, 2), weight, self.bias, padding=kernel // 2, groups=self.groups)
        return self.activation(out[..., : x.shape[1]].transpose(1, 2))

    def _norm(self) -> Float[Tensor, "1 1 k"]:
        return self.direction.square().sum((0, 1), keepdim=True).sqrt()

    @staticmethod
    def _rest(tokens: Tokens) -> int:
        """Padding behind the last item of a packed row."""
        assert tokens.layout is not None
        return tokens.x.shape[1] - tokens.layout.total


Rates = Float[Tensor, " c"]
"""How far each pair of channels turns from one place to the next, in radians."""


class Rotary(nn.Module):
    """Rotate pairs of channels by the position (RoPE, arXiv 2104.09864), an equal share of them for each axis.

    `scaling` changes the rates, so that a model reads longer texts than it was trained on.

    Raises:
        ValueError: head channels that do not divide by twice the number of axes.
    """

    rates: Tensor

    def __init__(
        self,
        head_dim: int,
        axes: Sequence[str] = ("time",),
        theta: float = 10_000.0,
        scaling: Callable[[Rates], Rates] | None = None,
    ):
        super().__init__()
        self.axes = [_axis(axis) for axis in axes]
        if head_dim % (2 * len(self.axes)):
            raise ValueError(f"{head_dim} head channels do not divide into pairs for {len(self.axes)} axes")
        rates = _rates(head_dim // len(self.axes), theta)
        self.register_buffer("rates", scaling(rates) if scaling else rates, persistent=False)

    def forward(
        self, q: Float[Tensor, "B T H d"], k: Float[Tensor, "B T G d"], position: Int[Tensor, "B T 3"]
    ) -> tuple[Float[Tensor, "B T H d"], Float[Tensor, "B T G d"]]:
        angles = (position[..., self.axes, None] * self.rates).flatten(-2)[:, :, None]
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: Float[Tensor, "B T H d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T H d"]:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@dataclass(frozen=True)
class LinearScaling:
    """All rates divided by `factor`: places as if they stood closer together (arXiv 2306.15595)."""

    factor: float

    def __call__(self, rates: Rates) -> Rates:
        return rates / self.factor


@dataclass(frozen=True)
class BandScaling:
    """Slow rates divided by `factor`, fast ones left alone, and a ramp between (Llama 3.1).

    A rate is slow when it turns less than `low` times within the `original` length, and fast when more than `high`.
    """

    factor: float
    low: float
    high: float
    original: int

    def __call__(self, rates: Rates) -> Rates:
        turns = self.original * rates / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - kept) * rates / self.factor + kept * rates


class NormedRotary(nn.Module):
    """Queries and keys, each with a norm over the channels of a head, and then rotated (Qwen3, arXiv 2505.09388)."""

    def __init__(
        self,
        head_dim: int,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        rotary: Callable[[int], nn.Module] = Rotary,
    ):
        super().__init__()
        self.query_norm, self.key_norm = norm(head_dim), norm(head_dim)
        self.rotary = rotary(head_dim)

    def forward(
        self, q: Float[Tensor, "B T H d"], k: Float[Tensor, "B T G d"], position: Int[Tensor, "B T 3"]
    ) -> tuple[Float[Tensor, "B T H d"], Float[Tensor, "B T G d"]]:
        return self.rotary(self.query_norm(q), self.key_norm(k), position)


def _rates(channels: int, theta: float) -> Rates:
    return 1.0 / theta ** (torch.arange(0, channels, 2) / channels)


def _axis(name: str) -> int:
    if name not in AXES:
        raise ValueError(f"axis {name!r}: a position has the axes {', '.join(AXES)}")
    return AXES[name]
