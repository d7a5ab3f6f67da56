"""Random numbers that are a pure function of counters: the same in every process, worker, batch and run."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit that goes in touches all that come out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(seed: int, epoch: int, indices: Int[np.ndarray, " N"], stream: str, n: int) -> UInt[np.ndarray, "N n"]:
    """n random uint64 for each index. Numbers of different `stream`s are independent of one another."""
    state = np.zeros(1, dtype=np.uint64)
    for counter in (seed, epoch, zlib.crc32(stream.encode())):
        state = _mix(state + np.uint64(((counter + 1) * _GOLDEN) & _MASK))
    rows = _mix(state + np.asarray(indices).astype(np.uint64) * np.uint64(_GOLDEN))
    steps = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(rows[:, None] + steps)


def uniform(seed: int, epoch: int, indices: Int[np.ndarray, " N"], stream: str, n: int) -> Float[np.ndarray, "N n"]:
    """n float64 in [0, 1) for each index."""
    return (bits(seed, epoch, indices, stream, n) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class Draw:
    """Random numbers for the samples `indices` of an epoch."""

    seed: int
    epoch: int
    indices: Int[np.ndarray, " N"]

    def uniform(self, stream: str, n: int) -> Float[np.ndarray, "N n"]:
        """n numbers in [0, 1) for each sample."""
        return uniform(self.seed, self.epoch, self.indices, stream, n)

    def around(self, stream: str, n: int) -> Float[np.ndarray, "N n"]:
        """n numbers in [-1, 1) for each sample."""
        return 2 * self.uniform(stream, n) - 1

    def seeds(self, stream: str) -> Int[np.ndarray, " N"]:
        """A seed of 63 bits for each sample, for generators of other libraries."""
        return (bits(self.seed, self.epoch, self.indices, stream, 1)[:, 0] >> np.uint64(1)).astype(np.int64)

    def of(self, rows: tuple[int, ...]) -> Draw:
        """The numbers of the items that belong to these rows of the batch."""
        return Draw(self.seed, self.epoch, self.indices[list(rows)])
