"""The tokens of each segment in chunks of one size, for mixers that work on stretches of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mmformer.tokens import Layout, Tokens
from mmformer.visibility import Sights, Visibility

Plan = TypeVar("Plan")

_plans: WeakKeyDictionary[Sights, dict[Hashable, object]] = WeakKeyDictionary()


def planned(sights: Sights, make: Callable[..., Plan], *options: Hashable) -> Plan:
    """What `make(tokens, *options)` says of the tokens that see, made once however many layers ask for it."""
    made = _plans.setdefault(sights, {})
    key = (make, *options)
    if key not in made:
        made[key] = make(sights.query, *options)
    return made[key]  # pyright: ignore[reportReturnType]


def is_causal(sights: Sights, mixer: str, instead: str, causal: bool = True) -> bool:
    """Whether a mixer that can do no more than that is to be causal.

    Raises:
        ValueError: any other rule, or a memory; `instead` is what to do about it.
    """
    refuse_memory(sights, mixer)
    rule = sights.visibility
    if rule == Visibility():
        return False
    if causal and rule == Visibility(causal=True):
        return True
    raise ValueError(f"{mixer} cannot honour {rule}: {instead}")


def refuse_memory(sights: Sights, mixer: str) -> None:
    """Stop where keys and values are to be remembered, which is asked of sights of another class."""
    if type(sights) is not Sights:
        raise ValueError(f"{mixer} keeps no memory: generate without one, or take mmformer.nn.Attention")


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks of `size` cells, those of a segment next to one another; the last one of a segment may have cells left.

    `index` is the token of each cell in the flattened (B T) sequence, and `real` is false for cells left over. `cell`
    is where each token is, and `valid` false for padding. `counts` are the chunks of each segment, on the host; a row
    of padded tokens is a segment, whose padding may stand anywhere and comes last here. `run` is set where the first so
    many tokens of one row are the first so many cells, as of one long text, so that none has to be moved.
    """

    size: int
    counts: np.ndarray
    index: Int[Tensor, "n c"]
    real: Bool[Tensor, "n c"]
    cell: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"]
    run: int | None = None

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def first(self) -> np.ndarray:
        """The first chunk of the segment that each chunk is of."""
        return np.repeat(self.counts.cumsum() - self.counts, self.counts)

    @cached_property
    def number(self) -> np.ndarray:
        """The place of each chunk in its segment."""
        return np.arange(len(self)) - self.first

    def cut(self, x: Shaped[Tensor, "B T ..."]) -> Shaped[Tensor, "n c ..."]:
        """Values of tokens by cell, zero in cells left over."""
        if self.run is not None:
            return _filled(x[0, : self.run], self.index.numel()).unflatten(0, self.index.shape)
        cells = x.flatten(0, 1).index_select(0, self.index.flatten()).unflatten(0, self.index.shape)
        return torch.where(self.real.view(*self.real.shape, *[1] * (x.ndim - 2)), cells, 0)

    def join(self, cells: Shaped[Tensor, "n c ..."]) -> Shaped[Tensor, "B T ..."]:
        """Values of cells by token, zero for padding."""
        if not len(self):
            return cells.new_zeros(*self.valid.shape, *cells.shape[2:])
        if self.run is not None:
            return _filled(cells.flatten(0, 1)[: self.run], self.cell.shape[1])[None]
        x = cells.flatten(0, 1).index_select(0, self.cell.flatten()).unflatten(0, self.cell.shape)
        return torch.where(self.valid.view(*self.valid.shape, *[1] * (cells.ndim - 2)), x, 0)

    def beside(self, steps: Sequence[int]) -> tuple[Int[Tensor, "n k"], Bool[Tensor, "n k"]]:
        """The chunk so many steps ahead of each in its segment, and whether there is one; itself where there is not."""
        key = tuple(steps)
        if key not in self._beside:
            self._beside[key] = self._find(key)
        return self._beside[key]

    @cached_property
    def _beside(self) -> dict[tuple[int, ...], tuple[Int[Tensor, "n k"], Bool[Tensor, "n k"]]]:
        return {}

    def _find(self, steps: Sequence[int]) -> tuple[Int[Tensor, "n k"], Bool[Tensor, "n k"]]:
        place = self.number[:, None] + np.asarray(steps, dtype=np.int64)
        exists = (place >= 0) & (place < np.repeat(self.counts, self.counts)[:, None])
        chunk = np.where(exists, self.first[:, None] + place, np.arange(len(self))[:, None])
        return on(chunk, self.index.device), on(exists, self.index.device)


def chunked(tokens: Tokens, size: int, reverse: bool = False) -> Chunks:
    """The chunks of a sequence, no larger than its longest segment; in `reverse` segments are read from their end."""
    if tokens.layout is None:
        return _of_rows(tokens, min(size, max(1, tokens.x.shape[1])), reverse)
    return _of_segments(tokens, tokens.layout, min(size, max(1, *tokens.layout.lengths, 1)), reverse)


def _of_segments(tokens: Tokens, layout: Layout, size: int, reverse: bool) -> Chunks:
    length, start = np.asarray(layout.lengths, dtype=np.int64), layout.offsets[:-1]
    counts = -(-length // size)
    first = counts.cumsum() - counts
    number = np.arange(counts.sum()) - np.repeat(first, counts)
    place = number[:, None] * size + np.arange(size)
    own = np.repeat(length, counts)[:, None]
    real, place = place < own, np.minimum(place, own - 1)
    index = np.repeat(start, counts)[:, None] + (own - 1 - place if reverse else place)
    order = np.arange(layout.total) - np.repeat(start, length)
    if reverse:
        order = np.repeat(length, length) - 1 - order
    cell = np.zeros(tokens.x.shape[1], dtype=np.int64)
    cell[: layout.total] = np.repeat(first * size, length) + order
    valid = np.arange(len(cell)) < layout.total
    arrays = (on(array, tokens.x.device) for array in (index, real, cell[None], valid[None]))
    run = None if reverse or (length[:-1] % size).any() else layout.total
    return Chunks(size, counts, *arrays, run=run)


def _of_rows(tokens: Tokens, size: int, reverse: bool) -> Chunks:
    valid, (rows, width) = tokens.valid, tokens.segment.shape
    each, device = -(-width // size), valid.device
    length = valid.sum(1, keepdim=True)
    place = torch.arange(each * size, device=device).expand(rows, -1)
    source = (length - 1 - place if reverse else place).clamp(0, max(width - 1, 0))
    order = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)
    base = torch.arange(rows, device=device)[:, None]
    index = base * width + order.gather(1, source)
    rank = valid.cumsum(1)
    cell = base * each * size + torch.where(valid, length - rank if reverse else rank - 1, 0)
    return Chunks(
        size,
        np.full(rows, each, dtype=np.int64),
        index.view(rows * each, size),
        (place < length).view(rows * each, size),
        cell,
        valid,
    )


def _filled(x: Shaped[Tensor, "t ..."], length: int) -> Shaped[Tensor, "u ..."]:
    """Rows with zeros behind them."""
    return x if len(x) == length else torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])


def smallest_step(tokens: Tokens) -> int:
    """By how much time goes on, at least, from each token to the next of its segment; 1 or more: all are in order.

    Asks the device.
    """
    chunks = chunked(tokens, 1)
    time, number = chunks.cut(tokens.position[..., 0])[:, 0], on(chunks.number, tokens.x.device)
    inside = chunks.real[1:, 0] & (number[1:] > 0)
    steps = torch.where(inside, time[1:] - time[:-1], 1)
    return int(torch.cat([steps, steps.new_ones(1)]).min())


def check_order(sights: Sights, mixer: str) -> None:
    """Stop where time goes back within a segment, so that what stands before a token may be later than it."""
    if planned(sights, smallest_step) < 0:
        raise ValueError(
            f"{mixer} takes what stands before a token for what is earlier, and here time goes back: "
            "let it run through the stream (fusion.sequential: true)"
        )


def on(values: np.ndarray, device: torch.device) -> Shaped[Tensor, ...]:
    """Host values on a device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def carried(
    states: Float[Tensor, "n ..."], chunks: Chunks, decay: Float[Tensor, "n ..."] | None = None
) -> Float[Tensor, "n ..."]:
    """What reaches each chunk from those before it in its segment: h[i + 1] = decay[i] h[i] + states[i], h[0] = 0.

    `decay` broadcasts over the states, and is 1 where not given. A scan by doubling: log2(chunks) passes over all.
    """
    step, longest = 1, int(chunks.counts.max(initial=0))
    while step < longest:
        before, decay_before = shifted(states, chunks, step), None if decay is None else shifted(decay, chunks, step)
        states = states + (before if decay is None else decay * before)
        decay = None if decay is None or decay_before is None else decay * decay_before
        step *= 2
    return shifted(states, chunks, 1)


def shifted(values: Shaped[Tensor, "n ..."], chunks: Chunks, step: int) -> Shaped[Tensor, "n ..."]:
    """For each chunk the values of the one `step` before it in its segment, zero where there is none."""
    chunk, exists = chunks.beside([-step])
    return torch.where(exists.view(-1, *[1] * (values.ndim - 1)), values.index_select(0, chunk[:, 0]), 0)
