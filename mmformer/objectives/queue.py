"""A queue of the last embeddings, as negatives beyond the batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Queue(nn.Module):
    """The last `size` rows that were added, with the id of what each shows; random unit vectors before (MoCo, ALBEF).

    A ring in buffers, so that it is part of a checkpoint; any number of rows may be added, whatever the size.

    Raises:
        ValueError: no room for a row.
    """

    rows: Float[Tensor, "Q D"]
    ids: Int[Tensor, " Q"]
    next: Int[Tensor, ""]

    def __init__(self, dim: int, size: int, seed: int = 0):
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue of {size} rows: give at least 1, or leave the queue out (queue: 0)")
        start = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("rows", nn.functional.normalize(start, dim=-1))
        self.register_buffer("ids", torch.full((size,), -100))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def add(self, rows: Float[Tensor, "n D"], ids: Int[Tensor, " n"]) -> None:
        """Put rows in the place of the oldest."""
        size = len(self.rows)
        count, rows, ids = len(rows), rows[-size:], ids[-size:]
        place = (self.next + count - len(rows) + torch.arange(len(rows), device=self.rows.device)) % size
        self.rows.index_copy_(0, place, rows.to(self.rows.dtype))
        self.ids.index_copy_(0, place, ids)
        self.next.copy_((self.next + count) % size)
