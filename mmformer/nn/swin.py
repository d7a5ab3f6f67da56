"""Windows on grids that shift from layer to layer, and the merging of grids to coarser ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mmformer.nn.chunks import Chunks, is_causal, on, planned
from mmformer.nn.grids import Grids, grids
from mmformer.tokens import PADDING, Layout, Tokens, segments
from mmformer.visibility import Sights

INSTEAD = "windows on grids know no order, so take mmformer.nn.Attention with this rule"


class SwinAttention(nn.Module):
    """Attention within `window` x `window` cells of each token's grid (Swin, arXiv 2103.14030, section 3.2).

    `shift` moves the windows by so many cells: give every second layer window // 2, and windows exchange what they
    know. A learned number for each head and difference of places is added to the scores (equation 4). An axis no
    longer than the window is not shifted. Cells beyond the edge of a grid are not seen (in the released code they are
    zeros that are). Grids are as in `DeformableAttention`; a text fills one column of its windows.

    Raises:
        ValueError: channels that do not divide by the heads; a shift beyond the window; a rule, or a memory.
    """

    def __init__(self, dim: int, num_heads: int, window: int, shift: int = 0, *, bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels do not divide by {num_heads} heads")
        if not 0 <= shift < window:
            raise ValueError(f"a shift of {shift} for windows of {window}: give at least 0 and less than the window")
        self.heads, self.window, self.shift = num_heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, num_heads) * 0.02)
        self.register_buffer("pairs", _pairs(window), persistent=False)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights) -> Float[Tensor, "B T D"]:
        is_causal(sights, "windowed attention of grids", INSTEAD, causal=False)
        chunks, seen = planned(sights, windows, self.window, self.shift)
        q, k, v = chunks.cut(self.qkv(tokens.x).unflatten(-1, (3, self.heads, -1))).permute(2, 0, 3, 1, 4)
        bias = self.bias().to(q.dtype)
        if seen is not None:
            bias = bias.masked_fill(~seen[:, None], -torch.inf)
        gathered = scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(q), -1, -1, -1))
        return self.out(chunks.join(gathered.transpose(1, 2)).flatten(2))

    def bias(self) -> Float[Tensor, "1 H c c"]:
        """What is added to the score of each query and key of a window."""
        pairs: Tensor = self.pairs  # pyright: ignore[reportAssignmentType]
        return self.table[pairs].permute(2, 0, 1)[None]


def _pairs(window: int) -> Int[Tensor, "c c"]:
    """The row of the table for each query and key of a window."""
    place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    apart = place[:, None] - place + window - 1
    return apart[..., 0] * (2 * window - 1) + apart[..., 1]


def windows(tokens: Tokens, window: int, shift: int) -> tuple[Chunks, Bool[Tensor, "n c c"] | None]:
    """The tokens of each window as a chunk, and which cells of it see which; None where all do.

    Shifted windows go round the edges, so that there are no more of them, and parts from far sides do not see each
    other. A cell without a token is seen by such cells alone.
    """
    found = grids(tokens)
    extent, place = np.stack([found.height, found.width], -1), np.stack([found.row, found.column], -1)
    count = -(-extent // window)
    moved = np.where(extent > window, shift, 0)[found.grid]
    edge = (count * window)[found.grid]
    place = (place - moved) % edge
    region = (place >= edge - moved) @ np.array([2, 1])
    total = count.prod(-1)
    down, across = (place // window).T
    chunk = (total.cumsum() - total)[found.grid] + down * count[found.grid, 1] + across
    cell = chunk * window**2 + (place % window) @ np.array([window, 1])
    shape = (int(total.sum()), window**2)
    index, part = np.zeros(shape, dtype=np.int64), np.full(shape, -1)
    index.flat[cell], part.flat[cell] = found.where, region
    cells, valid = np.zeros(tokens.segment.numel(), dtype=np.int64), np.zeros(tokens.segment.numel(), dtype=bool)
    cells[found.where], valid[found.where] = cell, True
    rows, device = tuple(tokens.segment.shape), tokens.x.device
    arrays = (index, part >= 0, cells.reshape(rows), valid.reshape(rows))
    index, real, cells, valid = (on(array, device) for array in arrays)
    chunks = Chunks(window**2, total, index, real, cells, valid)
    if (part == part[:, :1]).all():
        return chunks, None
    parts = on(part, device)
    return chunks, parts[:, :, None] == parts[:, None]


class PatchMerging(nn.Module):
    """A stage after which 2 x 2 cells of a grid are one token of `dim_out` channels (Swin, arXiv 2103.14030).

    The four are joined, normalised and mapped; what is missing at an odd edge is zero. Positions count the new cells.
    A text or a sound has half as many tokens. Positions are copied to the host.
    """

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim_in)
        self.reduction = nn.Linear(4 * dim_in, dim_out, bias=False)

    def forward(self, tokens: Tokens) -> Tokens:
        found = grids(tokens)
        source, position, owner = _quarters(found)
        x = torch.cat([tokens.x.flatten(0, 1), tokens.x.new_zeros(1, tokens.x.shape[-1])])
        index = on(np.where(source < 0, len(x) - 1, source), x.device)
        merged = self.reduction(self.norm(x.index_select(0, index.flatten()).unflatten(0, index.shape).flatten(1)))
        modality = tokens.modality.flatten()[on(source.max(1), x.device)]
        if tokens.layout is not None:
            lengths = np.bincount(owner, minlength=len(tokens.layout.lengths))
            layout = replace(tokens.layout, lengths=tuple(lengths.tolist()))
            return _row(merged, modality, on(position, x.device), layout)
        return _rows(merged, modality, on(position, x.device), owner, len(tokens.x))


def _quarters(found: Grids) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By merged token: its four tokens (-1: none), column by column; its position; and the owner of its grid."""
    down, across = -(-found.height // 2), -(-found.width // 2)
    first = (down * across).cumsum() - down * across
    cell = first[found.grid] + found.row // 2 * across[found.grid] + found.column // 2
    source = np.full((int((down * across).sum()), 4), -1)
    source[cell, found.row % 2 + 2 * (found.column % 2)] = found.where
    starts = np.flatnonzero(np.diff(found.grid, prepend=-1))
    origin = np.minimum.reduceat(found.position, starts) if len(starts) else found.position
    place = origin[found.grid] + (found.position - origin[found.grid]) // 2
    position = np.zeros((len(source), 3), dtype=np.int64)
    position[cell] = place
    kept = source.max(1, initial=-1) >= 0  # cells that a stage before has left empty
    return source[kept], position[kept], np.repeat(found.owner, down * across)[kept]


def _row(x: Float[Tensor, "n D"], modality: Int[Tensor, " n"], position: Int[Tensor, "n 3"], layout: Layout) -> Tokens:
    return Tokens(
        x=x[None],
        modality=modality[None],
        position=position[None],
        segment=segments(layout, len(x), x.device),
        layout=layout,
    )


def _rows(
    x: Float[Tensor, "n D"],
    modality: Int[Tensor, " n"],
    position: Int[Tensor, "n 3"],
    owner: np.ndarray,
    rows: int,
) -> Tokens:
    """Tokens of these rows, padded to the longest."""
    count = np.bincount(owner, minlength=rows)
    width = int(count.max(initial=0))
    cell = np.arange(len(owner)) - (count.cumsum() - count)[owner] + owner * width
    where = on(cell, x.device)

    def spread(values: Tensor, fill: int) -> Tensor:
        out = values.new_full((rows * width, *values.shape[1:]), fill)
        return out.index_copy(0, where, values).unflatten(0, (rows, width))

    return Tokens(
        x=spread(x, 0),
        modality=spread(modality, 0),
        position=spread(position, 0),
        segment=spread(torch.zeros_like(modality), PADDING),
    )
