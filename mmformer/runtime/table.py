"""Vectors to search in on the device: what `mmformer index` made, in one file for numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ID = "id"
BLOCK = 1 << 20
"""Numbers that are scored at a time: 4 MB in float32."""


class Hit(NamedTuple):
    """One row that was found; `score` is the cosine."""

    id: str
    score: float
    row: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows, each with an `id`, and a vector of length 1 for each, (rows, D) float32 or float16."""

    rows: tuple[Mapping[str, Any], ...]
    vectors: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[str | Mapping[str, Any]], vectors: np.ndarray, half: bool = False) -> Table:
        """A table over these vectors, of rows or of ids alone; `half` keeps 16 bits of each number.

        Raises:
            ValueError: not one row for each vector, or a vector that is NaN or zero.
        """
        if len(rows) != len(vectors):
            raise ValueError(f"{len(rows)} rows for {len(vectors)} vectors: give one for each")
        held = tuple({ID: row} if isinstance(row, str) else dict(row) for row in rows)
        return cls(held, _unit(vectors).astype(np.float16 if half else np.float32))

    def save(self, path: str | Path) -> Path:
        """Write it as one .npz file, in which nothing can run code."""
        path = Path(path)
        text = json.dumps(self.rows, ensure_ascii=False).encode()
        with path.open("wb") as file:
            np.savez(file, vectors=self.vectors, rows=np.frombuffer(text, dtype=np.uint8))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Open what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged.
        """
        try:
            with np.load(Path(path), allow_pickle=False) as held:
                vectors, rows = held["vectors"], json.loads(held["rows"].tobytes())
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(f"{path} is no table of vectors, or damaged: {error}") from error
        if len(rows) != len(vectors):
            raise ValueError(f"{path} is damaged: {len(rows)} rows for {len(vectors)} vectors")
        return cls(tuple(rows), vectors)

    def search(self, queries: np.ndarray, k: int = 10) -> Any:
        """The k rows of the largest cosine with a query (D,), best first; a list of them for several (Q, D).

        Raises:
            ValueError: vectors of another length, or one that is NaN or zero.
        """
        if queries.shape[-1] != self.vectors.shape[1]:
            raise ValueError(
                f"vectors of {queries.shape[-1]} numbers, this table has vectors of {self.vectors.shape[1]}"
            )
        found = [self._nearest(query, k) for query in _unit(np.atleast_2d(queries))]
        return found[0] if queries.ndim == 1 else found

    def __len__(self) -> int:
        return len(self.rows)

    def _nearest(self, query: np.ndarray, k: int) -> list[Hit]:
        step = max(1, BLOCK // self.vectors.shape[1])
        parts = [self.vectors[i : i + step].astype(np.float32) @ query for i in range(0, len(self), step)]
        scores = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        k = min(k, len(scores))
        best = np.argpartition(-scores, k - 1)[:k] if k else np.zeros(0, np.int64)
        best = best[np.lexsort((best, -scores[best]))]  # the earlier row first where two score the same
        return [Hit(self.rows[i][ID], float(scores[i]), self.rows[i]) for i in best]


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    wrong = ~(np.isfinite(lengths) & (lengths > 0))[:, 0]
    if wrong.any():
        raise ValueError(f"vector {int(wrong.argmax())} is zero, infinite or NaN and has no direction: leave it out")
    return vectors / lengths
