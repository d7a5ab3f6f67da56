"""Pictures and spectrograms to tokens: patches, or a stack of convolutions, on items of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.encoders.encoder import in_rows, packed
from mmformer.nn.position import AXES, StretchedGrid
from mmformer.tokens import Layout, Tokens, segments

Grid = tuple[int, int]


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel; values in the units of the raw items."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, x: Tensor) -> Float[Tensor, ...]:
        return (x - self.mean) / self.std


class LinearPatches(nn.Module):
    """Cut a plane into patches of `size` and map each linearly (ViT, arXiv 2010.11929)."""

    local = True
    """Whether a token depends on the pixels under it alone, so that a plane may be filled up behind its end."""

    def __init__(self, dim: int, channels: int, size: Sequence[int], bias: bool = True):
        super().__init__()
        self.size = (size[0], size[1])
        self.steps = ((size[0], size[0]), (size[1], size[1]))  # of each axis, the stride and the reach of a token
        self.linear = nn.Linear(size[0] * size[1] * channels, dim, bias=bias)

    def grid(self, height: int, width: int) -> Grid:
        """Patches down and across a plane.

        Raises:
            ValueError: a plane that does not divide into patches.
        """
        if height % self.size[0] or width % self.size[1]:
            raise ValueError(
                f"an item of {height} x {width} does not divide into patches of {self.size[0]} x {self.size[1]}: "
                "set the feature's multiple to the patch size"
            )
        return height // self.size[0], width // self.size[1]

    def forward(self, planes: list[Float[Tensor, "_ _ _ C"]]) -> Float[Tensor, "T D"]:
        return self.linear(torch.cat([self._cut(plane) for plane in planes]))

    def _cut(self, plane: Float[Tensor, "n h w C"]) -> Float[Tensor, "t p"]:
        n, height, width, channels = plane.shape
        (p, q), (rows, columns) = self.size, self.grid(height, width)
        cells = plane.view(n, rows, p, columns, q, channels).permute(0, 1, 3, 2, 4, 5)
        return cells.reshape(n * rows * columns, p * q * channels)


class StridedPatches(nn.Module):
    """Patches of `size` that overlap or leave gaps, one every `stride` (AST, arXiv 2104.01778)."""

    local = True

    def __init__(self, dim: int, channels: int, size: Sequence[int], stride: Sequence[int]):
        super().__init__()
        self.steps = ((stride[0], size[0]), (stride[1], size[1]))
        self.convolution = nn.Conv2d(channels, dim, (size[0], size[1]), (stride[0], stride[1]))

    def grid(self, height: int, width: int) -> Grid:
        """Patches down and across a plane.

        Raises:
            ValueError: a plane smaller than one patch.
        """
        (p, q), (down, across) = self.convolution.kernel_size, self.convolution.stride
        if height < p or width < q:
            raise ValueError(f"an item of {height} x {width} is smaller than a patch of {p} x {q}: make it larger")
        return (height - p) // down + 1, (width - q) // across + 1

    def forward(self, planes: list[Float[Tensor, "_ _ _ C"]]) -> Float[Tensor, "T D"]:
        cells = [self.convolution(plane.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for plane in planes]
        return torch.cat([cell.flatten(0, 2) for cell in cells])


class ConvolutionStem(nn.Module):
    """A stack of 3 x 3 convolutions with stride 2, each followed by a norm and ReLU, then a linear map to `dim`.

    One number in `widths` for each halving. With `num_columns`, that many columns (mel bins after the halvings) are
    joined into one token. Transformers behind such a stem train more easily than behind patches (arXiv 2106.14881).
    """

    local = False  # the norms are over the whole plane

    def __init__(self, dim: int, channels: int, widths: Sequence[int], num_columns: int | None = None):
        super().__init__()
        self.num_columns = num_columns
        self.factor = 2 ** len(widths)
        self.steps = ((self.factor, 1), (self.factor, 1))
        self.layers = nn.Sequential()
        for inside, outside in zip([channels, *widths], widths, strict=False):
            self.layers.append(nn.Conv2d(inside, outside, 3, stride=2, padding=1))
            self.layers.append(nn.GroupNorm(1, outside))
            self.layers.append(nn.ReLU())
        self.linear = nn.Linear(widths[-1] * (num_columns or 1), dim)

    def grid(self, height: int, width: int) -> Grid:
        """Tokens down and across a plane; an odd size rounds up at each halving."""
        rows, columns = -(-height // self.factor), -(-width // self.factor)
        return rows, columns if self.num_columns is None else 1

    def forward(self, planes: list[Float[Tensor, "_ _ _ C"]]) -> Float[Tensor, "T D"]:
        return self.linear(torch.cat([self._convolve(plane) for plane in planes]))

    def _convolve(self, plane: Float[Tensor, "n h w C"]) -> Float[Tensor, "t c"]:
        out = self.layers(plane.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # n, rows, columns, channels
        return out.flatten(0, 2) if self.num_columns is None else out.flatten(2).flatten(0, 1)


class ClassTokens(nn.Module):
    """`count` learned vectors that go in front of every item, with positions of their own if wanted (ViT)."""

    def __init__(self, dim: int, count: int, positions: bool = False):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(count, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(count, dim) * 0.02) if positions else None

    def forward(self) -> Float[Tensor, "K D"]:
        return self.tokens if self.positions is None else self.tokens + self.positions


class MaskVector(nn.Module):
    """A learned vector in place of what an encoder is not to see (BEiT, arXiv 2106.08254)."""

    def __init__(self, dim: int):
        super().__init__()
        self.vector = nn.Parameter(torch.randn(dim) * 0.02)

    def forward(self, x: Float[Tensor, "T D"], hidden: Bool[Tensor, " T"]) -> Float[Tensor, "T D"]:
        return torch.where(hidden[:, None], self.vector.to(x.dtype), x)


class PlaneEmbedder(nn.Module):
    """Items with two axes, a picture (height, width, C) or a spectrogram (frames, mels), to tokens.

    `stem` turns planes into vectors; `axes` names the two axes of a position that the grid's rows and columns fill.
    `mask` makes what stands for hidden cells.

    Raises:
        ValueError: hidden cells that are not as many as there are, or no mask vector to stand for them.
    """

    def __init__(
        self,
        dim: int,
        stem: LinearPatches | StridedPatches | ConvolutionStem,
        normalize: nn.Module,
        *,
        modality: str,
        axes: Sequence[str],
        position: Callable[[int], nn.Module] | None = None,
        class_tokens: Callable[[int], ClassTokens] | None = None,
        mask: Callable[[int], MaskVector] | None = None,
    ):
        super().__init__()
        self.modality, self.axes = modality, [AXES[axis] for axis in axes]
        self.stem, self.normalize = stem, normalize
        self.position = position(dim) if position else None
        self.class_tokens = class_tokens(dim) if class_tokens else None
        self.mask = mask(dim) if mask else None

    def forward(self, items: Ragged, num_samples: int) -> Tokens:
        planes = [self.normalize(as_planes(group)) for group in items.groups()]
        grids = [self.stem.grid(plane.shape[1], plane.shape[2]) for plane in planes]
        x = self._masked(self.stem(planes), items.hidden)
        counted = [(grid, plane.shape[0]) for grid, plane in zip(grids, planes, strict=True)]
        position = self._positions(counted).to(x.device, non_blocking=True)
        if isinstance(self.position, StretchedGrid):
            x = x + torch.cat([self.position(grid).repeat(count, 1) for grid, count in counted])
        elif self.position is not None:
            x = x + self.position(position)
        lengths = [
            rows * columns for (rows, columns), plane in zip(grids, planes, strict=True) for _ in range(plane.shape[0])
        ]
        if self.class_tokens is not None:
            x, position, lengths = self._with_class_tokens(x, position, lengths)
        return packed(x, position, self.modality, Layout(items.rows, tuple(lengths), num_samples, items.places))

    @property
    def local(self) -> bool:
        """Whether items may be filled up behind their end, as no token changes by it."""
        return self.stem.local and not isinstance(self.position, StretchedGrid)

    def padded(self, values: Shaped[Tensor, "B h w *C"], size: Int[Tensor, "B axes"]) -> Tokens:
        """Padded tokens of one plane a sample, of which `size` rows and columns are real; 0 stands for none.

        A spectrogram has all of its columns, and a size in rows alone. Unless the embedder is `local`, all planes must
        be real to their end.
        """
        plane = self.normalize(as_planes(values))
        grid = self.stem.grid(plane.shape[1], plane.shape[2])
        x = self.stem([plane]).unflatten(0, (plane.shape[0], -1))
        position, inside = self._cells(grid, size)
        if isinstance(self.position, StretchedGrid):
            x = x + self.position(grid)
        elif self.position is not None:
            x = x + self.position(position)
        if self.class_tokens is not None:
            extra = self.class_tokens().to(x.dtype).expand(x.shape[0], -1, -1)
            x, position = torch.cat([extra, x], 1), F.pad(position, (0, 0, extra.shape[1], 0))
            inside = torch.cat([(size > 0).all(1, keepdim=True).expand(-1, extra.shape[1]), inside], 1)
        return in_rows(x, position.expand(x.shape[0], -1, -1), self.modality, inside)

    def _cells(self, grid: Grid, size: Int[Tensor, "B axes"]) -> tuple[Int[Tensor, "T 3"], Bool[Tensor, "B T"]]:
        """The positions of a grid's cells, and which of them are real in a plane of which `size` is."""
        down, across = torch.meshgrid(*(torch.arange(count, device=size.device) for count in grid), indexing="ij")
        axes = [torch.zeros_like(down)] * 3
        axes[self.axes[0]] = down
        axes[self.axes[1]] = axes[self.axes[1]] + across
        inside = torch.ones(size.shape[0], *grid, dtype=torch.bool, device=size.device)
        for place, (stride, reach), real in zip((down, across), self.stem.steps, size.unbind(1), strict=False):
            inside = inside & (place * stride + reach <= real[:, None, None])
        return torch.stack(axes, -1).flatten(0, 1), inside.flatten(1)

    def _masked(self, x: Float[Tensor, "T D"], hidden: Bool[np.ndarray, " U"] | None) -> Float[Tensor, "T D"]:
        if hidden is None:
            return x
        if len(hidden) != len(x):
            raise ValueError(f"it is said of {len(hidden)} cells whether they are hidden, and the items have {len(x)}")
        if self.mask is None:
            raise ValueError(
                f"cells of {self.modality} are hidden, and nothing stands for them: give the embedder a mask vector "
                "(mask: {_target_: mmformer.encoders.MaskVector, _partial_: true})"
            )
        return self.mask(x, torch.from_numpy(hidden).to(x.device, non_blocking=True))

    def _positions(self, grids: list[tuple[Grid, int]]) -> Int[Tensor, "T 3"]:
        out = []
        for (rows, columns), count in grids:
            place = np.zeros((rows, columns, 3), dtype=np.int64)
            place[..., self.axes[0]] = np.arange(rows)[:, None]
            place[..., self.axes[1]] += np.arange(columns)
            out.append(np.tile(place.reshape(-1, 3), (count, 1)))
        return torch.from_numpy(np.concatenate(out))

    def _with_class_tokens(
        self, x: Float[Tensor, "T D"], position: Int[Tensor, "T 3"], lengths: list[int]
    ) -> tuple[Float[Tensor, "U D"], Int[Tensor, "U 3"], list[int]]:
        assert self.class_tokens is not None
        extra = self.class_tokens().to(x.dtype)
        place = position.new_zeros(len(extra), 3)
        parts = [part for item in x.split(lengths) for part in (extra, item)]
        places = [part for item in position.split(lengths) for part in (place, item)]
        return torch.cat(parts), torch.cat(places), [length + len(extra) for length in lengths]


class PatchDropout(nn.Module):
    """A stage that leaves out a `share` of each item's tokens in training, so that the row is so much shorter.

    What is left has its positions (FLIP, arXiv 2212.00794). The first `prefix` tokens, those of a class, always stay,
    and so does one more.

    Raises:
        ValueError: padded tokens.
    """

    def __init__(self, share: float, prefix: int = 0):
        super().__init__()
        self.share, self.prefix = share, prefix

    def forward(self, tokens: Tokens) -> Tokens:
        if not self.training:
            return tokens
        if tokens.layout is None:
            raise ValueError("padded tokens do not get fewer by dropping some: train with packed ones")
        layout = tokens.layout
        kept = [self._kept(length) for length in layout.lengths]
        index = np.concatenate([part + start for part, start in zip(kept, layout.offsets[:-1], strict=True)])
        shorter = replace(layout, lengths=tuple(len(part) for part in kept))
        gather = torch.from_numpy(index).to(tokens.x.device, non_blocking=True)
        return Tokens(
            x=tokens.x.index_select(1, gather),
            modality=tokens.modality.index_select(1, gather),
            position=tokens.position.index_select(1, gather),
            segment=segments(shorter, len(index), tokens.x.device),
            layout=shorter,
        )

    def _kept(self, length: int) -> np.ndarray:
        """The places of an item's tokens that stay, in their order."""
        cells = max(0, length - self.prefix)
        count = min(cells, max(1, round(cells * (1 - self.share))))
        chosen = torch.randperm(cells)[:count].sort().values.numpy() + self.prefix
        return np.concatenate([np.arange(length - cells), chosen])


def as_planes(group: Tensor) -> Float[Tensor, "n h w C"]:
    """Items of one shape as floating-point planes; spectrograms get a channel."""
    plane = group if group.ndim == 4 else group[..., None]
    return plane if plane.is_floating_point() else plane.float()
