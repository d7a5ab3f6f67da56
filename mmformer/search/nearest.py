"""Exact nearest neighbours: a matrix product a block, and the best of what came so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

NONE = -1
"""In place of a row where fewer rows than were asked for can be found."""

Block = tuple[Int[Tensor, " n"], Float[Tensor, "n D"]]
"""Numbers of some rows, and their vectors."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """For each query the k rows that are nearest, in falling order of their scores; NONE and -inf fill up."""

    rows: Int[Tensor, "Q k"]
    scores: Float[Tensor, "Q k"]

    def best(self, k: int) -> Found:
        """The k best of these, in order."""
        scores, place = self.scores.topk(min(k, self.scores.shape[1]), dim=1)
        return Found(rows=self.rows.gather(1, place), scores=scores)

    def beside(self, other: Found) -> Found:
        """What two searches found for the same queries, the one behind the other."""
        return Found(rows=torch.cat([self.rows, other.rows], 1), scores=torch.cat([self.scores, other.scores], 1))


def average(vectors: Sequence[Float[Tensor, " D"]]) -> Float[Tensor, " D"]:
    """One query of several, such as a picture and a sentence: the mean of their directions."""
    return normalize(normalize(torch.stack(list(vectors)).float(), dim=-1).mean(0), dim=-1)


def nothing(queries: int, k: int) -> Found:
    """No row for any query."""
    return Found(rows=torch.full((queries, k), NONE), scores=torch.full((queries, k), -torch.inf))


def nearest(queries: Float[Tensor, "Q D"], blocks: Iterable[Block], k: int) -> Found:
    """The k rows of all blocks with the largest dot product with each query, in float32."""
    best = nothing(len(queries), k)
    for numbers, vectors in blocks:
        scores, place = (queries @ vectors.float().T).topk(min(k, len(vectors)), dim=1)
        best = best.beside(Found(rows=numbers[place], scores=scores)).best(k)
    return best
