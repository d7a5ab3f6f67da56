"""Patterns of who sees whom among the tokens of one modality: windows and blocks, by where tokens stand.

A pattern is asked twice. `allows` says it of pairs of tokens, for a dense mask or FlexAttention; `may` says it of boxes
around many tokens, so that a kernel finds what a tile of queries looks at without comparing all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from mmformer.tokens import modality_id


@dataclass(frozen=True, slots=True)
class Box:
    """The least and greatest position of some tokens, of one box or of n.

    `last` is the last time of their segment, -1 where they are of several.
    """

    low: Int64[np.ndarray, "*n 3"]
    high: Int64[np.ndarray, "*n 3"]
    last: int = -1


@runtime_checkable
class Pattern(Protocol):
    """Who sees whom among tokens of one modality and segment."""

    @property
    def tile(self) -> int:
        """How many queries are best served together."""
        ...

    @property
    def period(self) -> int:
        """Only positions that differ by a multiple of this see one another, as far as they are near."""
        ...

    @property
    def shifts(self) -> bool:
        """Whether only differences between positions count."""
        ...

    def is_global(self, modality: Int[Tensor, "*n"], position: Int[Tensor, "*n 3"]) -> Bool[Tensor, "*n"]:
        """Which tokens see all and are seen by all."""
        ...

    def allows(
        self, query: Int[Tensor, "*q 3"], key: Int[Tensor, "*k 3"], last: Int[Tensor, "*q"] | None
    ) -> Bool[Tensor, "*qk"]:
        """Whether each query sees each key, for shapes that broadcast; `last` is the last time of the segment."""
        ...

    def may(self, query: Box, key: Box) -> Bool[np.ndarray, " n"]:
        """Whether any token of one box might see one of each of n others."""
        ...


@dataclass(frozen=True)
class Window:
    """Keys near by: no coordinate (time, row, column) differs by more than `size`.

    With a `dilation` d all differences are multiples of d, so that the same number of keys reaches d times as far.
    Global tokens see all of their segment and are seen by all of it (Longformer, arXiv 2004.05150): those whose
    coordinates are all below `first`, as a class token at the front, and those of `modalities`, as latents.

    Raises:
        ValueError: a negative size or a dilation below 1.
    """

    size: int
    dilation: int = 1
    first: int = 0
    modalities: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"window is {self.size}: give a distance of at least 0, or null for no window")
        if self.dilation < 1:
            raise ValueError(f"dilation is {self.dilation}: 1 looks at every key, 2 at every other")
        object.__setattr__(self, "modalities", tuple(self.modalities))
        object.__setattr__(
            self, "_numbers", tuple(map(modality_id, self.modalities))
        )  # compiled code cannot hash names

    @property
    def tile(self) -> int:
        return min(max(self.size // (2 * self.dilation), 32), 128)

    @property
    def period(self) -> int:
        return self.dilation

    @property
    def shifts(self) -> bool:
        return not self.first

    def is_global(self, modality: Int[Tensor, "*n"], position: Int[Tensor, "*n 3"]) -> Bool[Tensor, "*n"]:
        found = torch.zeros_like(modality, dtype=torch.bool)
        for number in getattr(self, "_numbers", ()):
            found = found | (modality == number)
        return found | (position < self.first).all(-1) if self.first else found

    def allows(
        self, query: Int[Tensor, "*q 3"], key: Int[Tensor, "*k 3"], last: Int[Tensor, "*q"] | None
    ) -> Bool[Tensor, "*qk"]:
        apart = query - key
        near = (apart.abs() <= self.size).all(-1)
        return near if self.dilation == 1 else near & (apart % self.dilation == 0).all(-1)

    def may(self, query: Box, key: Box) -> Bool[np.ndarray, " n"]:
        return np.all((key.low <= query.high + self.size) & (query.low <= key.high + self.size), axis=-1)


class _Blocks:
    """What patterns over blocks of `size` times have in common: a token is in block time // size."""

    size: int
    period = 1
    shifts = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"blocks of {self.size} times: give at least 1")

    @property
    def tile(self) -> int:
        return min(self.size, 128)

    def is_global(self, modality: Int[Tensor, "*n"], position: Int[Tensor, "*n 3"]) -> Bool[Tensor, "*n"]:
        return torch.zeros_like(modality, dtype=torch.bool)

    def _spans(self, query: Box, key: Box) -> tuple[int, int, np.ndarray, np.ndarray]:
        """First and last block of a box, and of n others."""
        first, end = int(query.low[0]) // self.size, int(query.high[0]) // self.size
        return first, end, key.low[:, 0] // self.size, key.high[:, 0] // self.size


@dataclass(frozen=True)
class Strided(_Blocks):
    """Blocks of `size` times that see the `local` blocks on either side and every `stride`-th beyond (Sparse
    Transformer, arXiv 1904.10509, at the grain of blocks).

    Every `stride`-th counts from the query's block, or with `fixed` from the start: the last block of each `stride`
    is seen by all.
    """

    size: int
    stride: int
    local: int = 1
    fixed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"every {self.stride}-th block: give a stride of at least 1")

    def _sees(self, apart: Tensor | np.ndarray, key: Tensor | np.ndarray) -> Tensor | np.ndarray:
        far = key % self.stride == self.stride - 1 if self.fixed else apart % self.stride == 0
        return far | (abs(apart) <= self.local)

    def allows(
        self, query: Int[Tensor, "*q 3"], key: Int[Tensor, "*k 3"], last: Int[Tensor, "*q"] | None
    ) -> Bool[Tensor, "*qk"]:
        mine, theirs = query[..., 0] // self.size, key[..., 0] // self.size
        seen = self._sees(mine - theirs, theirs)
        assert isinstance(seen, Tensor)
        return seen

    def may(self, query: Box, key: Box) -> Bool[np.ndarray, " n"]:
        first, end, low, high = self._spans(query, key)
        out = high - low > self.stride
        for block in range(first, min(end, first + self.stride) + 1):
            for step in range(int((high - low).clip(max=self.stride).max(initial=0)) + 1):
                at = np.minimum(low + step, high)
                out |= np.asarray(self._sees(block - at, at))
        return out | ((low <= end + self.local) & (first <= high + self.local))


@dataclass(frozen=True)
class BigBird(_Blocks):
    """Blocks of `size` times that see the `window` blocks on either side, the first and the last block, and `random`
    others (BigBird, arXiv 2007.14062); the first and the last block see all.

    The random blocks are a function of the seed, the block and how many blocks there are, one from each of `random`
    stretches of those that are not seen anyway: give each layer a `seed` of its own.
    """

    size: int
    random: int = 3
    window: int = 1
    seed: int = 0

    def random_block(self, block: Int[Tensor, "*q"], count: Int[Tensor, "*q"], turn: int) -> Int[Tensor, "*q"]:
        """The random block of number `turn` that each block of `count` sees; -1 where there are not so many."""
        low, high = (block - self.window).clamp(min=1), torch.minimum(block + self.window, count - 2)
        near = (high - low + 1).clamp(min=0)
        others = (count - 2).clamp(min=0) - near
        start, stop = others * turn // self.random, others * (turn + 1) // self.random
        place = start + _mixed(block, turn, self.seed) % (stop - start).clamp(min=1)
        found = 1 + place + torch.where((1 + place >= low) & (near > 0), near, 0)
        return torch.where(stop > start, found, -1)

    def allows(
        self, query: Int[Tensor, "*q 3"], key: Int[Tensor, "*k 3"], last: Int[Tensor, "*q"] | None
    ) -> Bool[Tensor, "*qk"]:
        if last is None:
            raise ValueError(f"{self} depends on how long a segment gets, which is not known while it is written")
        mine, theirs, count = query[..., 0] // self.size, key[..., 0] // self.size, last // self.size + 1
        seen = (mine == 0) | (mine == count - 1) | (theirs == 0) | (theirs == count - 1)
        seen = seen | ((mine - theirs).abs() <= self.window)
        for turn in range(self.random):
            seen = seen | (theirs == self.random_block(mine, count, turn))
        return seen

    def may(self, query: Box, key: Box) -> Bool[np.ndarray, " n"]:
        first, end, low, high = self._spans(query, key)
        count = query.last // self.size + 1
        if query.last < 0 or first == 0 or end == count - 1:
            return np.ones(len(low), dtype=bool)
        out = (low == 0) | (high == count - 1) | ((low <= end + self.window) & (first <= high + self.window))
        blocks = torch.arange(first, end + 1)
        for turn in range(self.random):
            chosen = self.random_block(blocks, torch.full_like(blocks, count), turn).numpy()
            out |= ((low[:, None] <= chosen) & (chosen <= high[:, None])).any(1)
        return out


def _mixed(block: Int[Tensor, "*q"], turn: int, seed: int) -> Int[Tensor, "*q"]:
    """Bits that look random, a function of the three (the finaliser of MurmurHash3)."""
    bits = 0xFFFFFFFF
    mixed = (block * 0x9E3779B1 + (turn * 0x85EBCA77 + seed * 0xC2B2AE3D)) & bits
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & bits
    mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & bits
    return mixed ^ (mixed >> 16)
