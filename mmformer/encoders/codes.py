"""Ids of a codec to tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.encoders.encoder import packed
from mmformer.nn.position import AXES
from mmformer.tokens import Layout, Tokens


@runtime_checkable
class Coder(Protocol):
    """What makes ids of raw items: a `mmformer.codec.FrozenCodec`."""

    def codes_of(self, items: Ragged) -> Ragged: ...


class CodeEmbedder(nn.Module):
    """The sum of one looked-up vector for each of the Q ids of a cell; `position` adds where the cell stands.

    Items are grids (rows, columns) of Q int64 ids, one for each codebook of `sizes`, as `Codec.encode` gives them; with
    a `codec` they are what it encodes. `axes` names the axes of a position that rows and columns fill: (row, column)
    for a picture, (time, column) for a sound.

    Raises:
        IndexError: an id outside its codebook.
        ValueError: another number of ids than there are codebooks.
    """

    def __init__(
        self,
        dim: int,
        sizes: Sequence[int],
        position: Callable[[int], nn.Module] | None = None,
        *,
        codec: Coder | None = None,
        modality: str = "image",
        axes: Sequence[str] = ("row", "column"),
    ):
        super().__init__()
        self.modality, self.axes = modality, [AXES[axis] for axis in axes]
        self.tables = nn.ModuleList(nn.Embedding(size, dim) for size in sizes)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.02)  # pyright: ignore[reportArgumentType]
        self.position = position(dim) if position else None
        self.codec = codec

    def forward(self, items: Ragged, num_samples: int) -> Tokens:
        codes = items if self.codec is None else self.codec.codes_of(items)
        if codes.values.shape[1] != len(self.tables):
            raise ValueError(
                f"{codes.values.shape[1]} ids a cell for {len(self.tables)} codebooks: "
                "give `sizes` as the codec's quantizer has them"
            )
        columns = codes.values.unbind(1)
        x = torch.stack([table(ids) for table, ids in zip(self.tables, columns, strict=True)]).sum(0)
        position = self._positions(codes.shapes).to(x.device, non_blocking=True)
        if self.position is not None:
            x = x + self.position(position)
        lengths = tuple(rows * columns for rows, columns in codes.shapes)
        return packed(x, position, self.modality, Layout(codes.rows, lengths, num_samples, codes.places))

    def _positions(self, grids: Sequence[tuple[int, ...]]) -> Int[Tensor, "T 3"]:
        out = []
        for rows, columns in grids:
            place = np.zeros((rows, columns, 3), dtype=np.int64)
            place[..., self.axes[0]] = np.arange(rows)[:, None]
            place[..., self.axes[1]] += np.arange(columns)
            out.append(place.reshape(-1, 3))
        return torch.from_numpy(np.concatenate(out))
