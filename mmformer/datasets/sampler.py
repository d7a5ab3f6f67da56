"""Which samples make up which batch: a pure function of the seed and the epoch, so that nothing has to be saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_POOL = 32
"""Batches whose samples are sorted by length together: many enough to find equal lengths, few enough to stay random."""


def counter_seed(*key: int | str) -> int:
    """A 63-bit seed for a counter, the same in every process, worker and run."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """How a split is cut into batches, over all processes together.

    Give either `batch_size` (samples) or `batch_tokens` (about so many tokens a batch, never more than one sample
    above it). `shuffle` draws a new order each epoch; without it the rows keep their order. `drop_last` leaves out
    the rows that do not fill a batch of `batch_size`, unless there is no other batch.
    """

    seed: int
    batch_size: int | None
    batch_tokens: int | None
    shuffle: bool
    drop_last: bool

    def __post_init__(self) -> None:
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise ValueError(
                f"batch_size is {self.batch_size} and batch_tokens {self.batch_tokens}: give one, set the other to null"
            )
        if (self.batch_size or self.batch_tokens or 0) < 1:
            raise ValueError(f"a batch of {self.batch_size or self.batch_tokens}: give a number of at least 1")


def plan(sizes: Sequence[int], epoch: int, rule: Batching) -> list[list[int]]:
    """The batches of one epoch, as lists of indices; their number is the same in every epoch."""
    count = len(sizes)
    order = np.arange(count)
    if rule.shuffle:
        order = np.random.default_rng(counter_seed(rule.seed, "order", epoch)).permutation(count)
    if rule.batch_size is not None:
        stop = count - count % rule.batch_size if rule.drop_last and count >= rule.batch_size else count
        return [order[i : i + rule.batch_size].tolist() for i in range(0, stop, rule.batch_size)]
    tokens = np.maximum(np.asarray(sizes, dtype=np.int64), 1)
    num_batches = -(-int(tokens.sum()) // (rule.batch_tokens or 1))
    if not rule.shuffle:
        return [part.tolist() for part in _cut(order, tokens, min(num_batches, count))]
    order = _sort_in_pools(order, tokens, num_batches)
    batches = _cut(order, tokens, min(num_batches, count))
    shuffled = np.random.default_rng(counter_seed(rule.seed, "batches", epoch)).permutation(len(batches))
    return [batches[i].tolist() for i in shuffled]


def _sort_in_pools(order: np.ndarray, tokens: np.ndarray, num_batches: int) -> np.ndarray:
    """Sort by length within pools of random samples, so that samples of one batch are about equally long."""
    pools = np.array_split(order, max(1, round(num_batches / _POOL)))
    return np.concatenate([pool[np.argsort(tokens[pool], kind="stable")] for pool in pools])


def _cut(order: np.ndarray, tokens: np.ndarray, num_batches: int) -> list[np.ndarray]:
    """Cut a sequence of samples into `num_batches` runs of about equal token count, none of them empty."""
    if not num_batches:
        return []
    ends = np.cumsum(tokens[order])
    marks = ends[-1] * np.arange(1, num_batches) / num_batches
    cuts = np.searchsorted(ends - tokens[order] / 2, marks)
    least = np.arange(1, num_batches)  # one sample at least on each side of a cut
    cuts = np.maximum.accumulate(cuts - least) + least
    cuts = np.clip(cuts, least, len(order) - num_batches + least)
    return np.split(order, cuts)


def share(batch: Sequence[int], sizes: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The part of a batch that one of several processes computes.

    The samples are dealt out back and forth by length, so that all get equally many, with about equally many tokens.
    """
    if world_size == 1:
        return list(batch)
    ranked = sorted(range(len(batch)), key=lambda i: -sizes[batch[i]])
    mine = {i for turn, i in enumerate(ranked) if _dealt_to(turn, world_size) == rank}
    return [index for i, index in enumerate(batch) if i in mine]


def _dealt_to(turn: int, world_size: int) -> int:
    lap, place = divmod(turn, world_size)
    return place if lap % 2 == 0 else world_size - 1 - place


class BatchSampler:
    """Yields the batches of an epoch as lists of (epoch, index), from any batch on.

    Every process yields the same number of batches. `resume_at` sets the batch that one epoch starts from; every other
    epoch starts from 0.
    """

    def __init__(self, sizes: Sequence[int], rule: Batching, rank: int = 0, world_size: int = 1) -> None:
        self.sizes = sizes
        self.rule = rule
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._resumed = (0, 0)
        self._num_batches = len(plan(sizes, 0, rule))
        # Lightning calls set_epoch on `loader.batch_sampler.sampler` only, never on the batch sampler itself.
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resume_at(self, epoch: int, batch: int) -> None:
        self.epoch = epoch
        self._resumed = (epoch, batch)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Not a generator: the epoch is read now, not when a worker asks for the first batch. And the start is kept:
        # a loader with workers asks for an iterator twice.
        epoch = self.epoch
        start = self._resumed[1] if epoch == self._resumed[0] else 0
        batches = plan(self.sizes, epoch, self.rule)[start:]
        return ([(epoch, i) for i in share(b, self.sizes, self.rank, self.world_size)] for b in batches)
