"""Token ids to tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.encoders.encoder import in_rows, packed
from mmformer.tokens import Layout, Tokens


class TextEmbedder(nn.Module):
    """Look up a vector for each id; `position` adds where it stands (leave it out for rotary attention).

    `num_types` vectors tell kinds of text apart (BERT's two sentences); all that is read here is of the first kind.
    A `table_dim` below `dim` factorises the table: narrow vectors and one map to the width (ALBERT, arXiv 1909.11942,
    section 3.1), vocab_size x table_dim + table_dim x dim weights instead of vocab_size x dim.

    Raises:
        IndexError: an id outside the vocabulary.
    """

    row: Tensor | None

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        position: Callable[[int], nn.Module] | None = None,
        *,
        num_types: int = 0,
        table_dim: int | None = None,
        rows: int | None = None,
        modality: str = "text",
    ):
        super().__init__()
        self.modality = modality
        self.table = nn.Embedding(rows or vocab_size, table_dim or dim)
        self.register_buffer("row", torch.arange(vocab_size) % rows if rows else None)
        nn.init.normal_(self.table.weight, std=0.02)
        self.widen = nn.Linear(table_dim, dim, bias=False) if table_dim else nn.Identity()
        self.position = position(dim) if position else None
        self.types = nn.Parameter(torch.randn(num_types, dim) * 0.02) if num_types else None

    def forward(self, items: Ragged, num_samples: int) -> Tokens:
        lengths = tuple(shape[0] for shape in items.shapes)
        layout = Layout(items.rows, lengths, num_samples, items.places)
        place = np.zeros((layout.total, 3), dtype=np.int64)
        place[:, 0] = np.arange(layout.total) - np.repeat(layout.offsets[:-1], lengths)
        position = torch.from_numpy(place).to(items.values.device, non_blocking=True)
        return packed(self.vectors(items.values, position), position, self.modality, layout)

    def padded(self, values: Int[Tensor, "B T"], size: Int[Tensor, "B 1"]) -> Tokens:
        """Padded tokens of texts with a row for each sample, `size` ids long; 0 stands for none."""
        place = torch.arange(values.shape[1], device=values.device)
        position = F.pad(place[:, None], (0, 2)).expand(values.shape[0], -1, -1)
        return in_rows(self.vectors(values, position), position, self.modality, place < size)

    def vectors(self, ids: Int[Tensor, "*B"], position: Int[Tensor, "*B 3"]) -> Float[Tensor, "*B D"]:
        """The vectors of ids at their places, which may come one at a time."""
        x = self.widen(self.table(ids if self.row is None else self.row[ids]))
        if self.types is not None:
            x = x + self.types[0]
        return x if self.position is None else x + self.position(position)
