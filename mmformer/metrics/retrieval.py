"""Retrieval as the field judges it: a query is answered by any key of its own group (a picture by any caption of it).

A group is a number that queries and keys share: the row of the picture, for the picture and for its captions. Ties are
counted honestly. Sorting would let the order of the rows decide among keys of one score, so that a model that says the
same of all may reach any recall; here a rank is what is expected over random orders of those keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RECALL_AT = (1, 5, 10)
CHUNK = 1024


def first_ranks(scores: Float[Tensor, "Q K"], relevant: Bool[Tensor, "Q K"]) -> Float[Tensor, " Q"]:
    """At which rank, from 1, each query finds the first key that is relevant; infinite where none is.

    The rank is 1 + g + t / (r + 1): g keys score higher than the best relevant one, and among those that score the
    same t are not relevant and r are, of which the first comes behind t / (r + 1) others on average. With one relevant
    key that is the g + (ties - 1) / 2 others before it.

    Raises:
        ValueError: a score is NaN, which no order knows.
    """
    _check(scores)
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    tied = scores == best
    right = (tied & relevant).sum(1)
    ranks = 1 + (scores > best).sum(1) + (tied & ~relevant).sum(1) / (right + 1)
    return torch.where(relevant.any(1), ranks, torch.inf)


def average_precisions(scores: Float[Tensor, "Q K"], relevant: Bool[Tensor, "Q K"]) -> Float[Tensor, " Q"]:
    """The mean, over the relevant keys of a query, of the precision among all keys that score at least as much.

    Without ties that is the average precision over ranks; keys of one score are cut off together, as by scikit-learn.
    0 for a query without a relevant key.

    Raises:
        ValueError: a score is NaN.
    """
    _check(scores)
    ordered, order = scores.sort(1, descending=True)
    hits = relevant.gather(1, order)
    # how many keys score at least as much as each: the end of its run of equal scores
    rising = -ordered.contiguous()
    above = torch.searchsorted(rising, rising, right=True)
    found = hits.cumsum(1).gather(1, above - 1)
    precision = (found / above).double()
    total = relevant.sum(1)
    return (precision * hits).sum(1) / total.clamp(min=1)


def judge_vectors(
    judge: Callable[[Tensor, Tensor], Tensor],
    queries: Float[Tensor, "Q D"],
    keys: Float[Tensor, "K D"],
    groups: tuple[Int[Tensor, " Q"], Int[Tensor, " K"]] | None = None,
    chunk: int = CHUNK,
) -> Float[Tensor, " Q"]:
    """`first_ranks` or `average_precisions` of dot products, for `chunk` queries at a time.

    `groups` are those of the queries and of the keys; without them query i is answered by key i alone.

    Raises:
        ValueError: without groups, unlike numbers of queries and keys; a vector that holds NaN.
    """
    if groups is None:
        if len(queries) != len(keys):
            raise ValueError(f"{len(queries)} queries and {len(keys)} keys: give the groups that say which belong")
        one = torch.arange(len(keys), device=keys.device)
        groups = (one, one)
    parts = zip(queries.split(chunk), groups[0].split(chunk), strict=True)
    judged = [judge(part @ keys.T, group[:, None] == groups[1]) for part, group in parts]
    return torch.cat(judged) if judged else queries.new_zeros(0)


def recalls(ranks: Float[Tensor, " Q"], cuts: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """R@K, the share of queries whose first relevant key is among the first K (`r@1`, ..); NaN without queries."""
    return {f"r@{cut}": float((ranks <= cut).double().mean()) for cut in cuts}


def reciprocal_rank(ranks: Float[Tensor, " Q"]) -> float:
    """MRR: the mean of 1 / rank, which is 0 for a query without a relevant key."""
    return float((1 / ranks.double()).mean())


def median_rank(ranks: Float[Tensor, " Q"]) -> float:
    """The median, of an even number the mean of the two in the middle."""
    ordered = ranks.double().sort().values
    return float((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)


def rsum(ranks: Sequence[Float[Tensor, " _"]], cuts: Sequence[int] = RECALL_AT) -> float:
    """RSUM: the recalls of all directions, in %, added up: at most 600 for two directions and three cuts."""
    return 100.0 * sum(value for direction in ranks for value in recalls(direction, cuts).values())


def in_folds(size: int, num: int) -> list[slice]:
    """Consecutive folds of `size` queries, as COCO's "1k" figures are the mean over five folds of its 5k test.

    Raises:
        ValueError: folds that are not of one size.
    """
    if num < 1 or size % num:
        raise ValueError(f"{size} rows in {num} folds: folds must be of one size")
    return [slice(start, start + size // num) for start in range(0, size, size // num)]


def _check(scores: Tensor) -> None:
    if bad := int(scores.isnan().any(1).sum()):
        raise ValueError(f"{bad} of {len(scores)} queries have a score that is NaN: leave out samples without a vector")
