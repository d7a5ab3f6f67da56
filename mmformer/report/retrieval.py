"""What a retrieval found: for each query the rank of its own sample, and the samples that came first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

SHOWN = 5
"""How many of the samples that came first are kept for each query."""


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """One direction of a retrieval, such as text to image, among the n samples that have both modalities.

    `ranks` say where each query found its own sample, from 1 (`mmformer.objectives.contrastive.retrieval_ranks`).
    `best` are the places in `ids` of what came first, in order, and `scores` how similar it is.
    """

    query: str
    key: str
    ids: tuple[str, ...]
    ranks: Float[np.ndarray, " n"]
    best: Int[np.ndarray, "n k"]
    scores: Float[np.ndarray, "n k"]

    def columns(self, direction: str, ids: Sequence[str]) -> dict[str, list[Any]]:
        """The columns of `predictions.parquet` for samples `ids`; null for those that lack one of the two."""
        place = {id: i for i, id in enumerate(self.ids)}
        rows = [place.get(id) for id in ids]
        return {
            f"rank_{direction}": [None if row is None else float(self.ranks[row]) for row in rows],
            f"found_{direction}": [None if row is None else self._found(row) for row in rows],
        }

    def _found(self, row: int) -> list[dict[str, Any]]:
        best, scores = self.best[row].tolist(), self.scores[row].tolist()
        return [{"id": self.ids[i], "score": score} for i, score in zip(best, scores, strict=True)]


@dataclass(frozen=True)
class Retrieval:
    """The retrieval in `predictions.parquet`, read: `directions["t2i"]` is ("text", "image").

    `extra` names the columns that come from the manifest.
    """

    table: pa.Table
    directions: Mapping[str, tuple[str, str]]
    extra: tuple[str, ...]

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> list[Any]:
        return self.table[name].to_pylist()

    def rows(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Samples by their place, each a dict of its columns."""
        return self.table.take(pa.array(places, pa.int64())).to_pylist()

    @cached_property
    def place(self) -> dict[str, int]:
        """The row of each sample."""
        return {id: row for row, id in enumerate(self.column("id"))}

    def ranks(self, direction: str) -> Float[np.ndarray, " N"]:
        """The rank at which each sample found itself; NaN for those that lack one of the two modalities."""
        return np.array([np.nan if rank is None else rank for rank in self.column(f"rank_{direction}")])

    def scores(self) -> Float[np.ndarray, " N"]:
        """The share of directions in which each sample was found first; NaN where there is none."""
        ranks = np.stack([self.ranks(direction) for direction in self.directions])
        known = ~np.isnan(ranks)
        count = known.sum(0)
        return np.where(count > 0, (known & (ranks <= 1)).sum(0) / np.maximum(count, 1), np.nan)


def chance(count: int, cut: int) -> float:
    """Recall at `cut` of a random order of `count` samples."""
    return min(cut / count, 1.0)
