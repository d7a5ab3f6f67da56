"""The index: vectors of one model's one space, with a table of what they belong to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmformer.search.inverted import PROBES, Inverted, lists_for, training_size
from mmformer.search.nearest import NONE, Block, Found, nearest, nothing
from mmformer.search.rows import ID, as_rows, is_in, joined, matching, refuse_known

BLOCK = 1 << 20
"""Numbers that are scored at a time: 4 MB in float32, which a processor keeps near."""
QUERIES = 1024
SCORED_AGAIN = 4
"""How many times as many rows as asked for an approximate search scores again exactly."""
FEW = 50_000
"""As many rows as a filter may leave for an exact search to be the faster one."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One row that was found; `score` is a cosine, or what the re-ranking said."""

    id: str
    score: float
    row: dict[str, Any]


Rerank = Callable[[int, Sequence[Hit]], Sequence[float]]
"""New scores for what the query of that number found, the higher the better."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Vectors of length 1, in float32 or float16, and a row for each; `name` is that of its files, once it has some."""

    vectors: Float[Tensor, "n D"]
    rows: pa.Table
    name: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Vectors that can be searched. It does not change: `add` and `remove` give a new one that shares the vectors.

    `model` says which model made the vectors, and every other vector must come from the same one. `inverted` speeds
    up the search in the first of its rows; those that were added since are searched exactly. `origin` is where the
    model lies.
    """

    model: str
    parts: tuple[Part, ...]
    inverted: Inverted | None = None
    origin: str = ""

    @classmethod
    def build(
        cls,
        vectors: Float[Tensor, "n D"],
        rows: pa.Table | Mapping[str, Sequence[Any]],
        *,
        model: str,
        half: bool = False,
    ) -> Index:
        """An index over these vectors, which are kept at length 1; `half` keeps them in float16.

        Raises:
            ValueError: no vectors, one that is NaN or zero, or rows without ids of their own.
        """
        dtype = torch.float16 if half else torch.float32
        return cls(model=model, parts=(_part(vectors, as_rows(rows, len(vectors)), dtype),))

    def add(self, vectors: Float[Tensor, "n D"], rows: pa.Table | Mapping[str, Sequence[Any]], *, model: str) -> Index:
        """This index with further rows.

        Raises:
            ValueError: vectors of another model, or rows that are in the index already.
        """
        self._check(vectors, model)
        new = as_rows(rows, len(vectors))
        refuse_known(self.rows, new)
        part = _part(vectors, new, self.parts[0].vectors.dtype)
        joined([self.rows.schema.empty_table(), new])
        return replace(self, parts=(*self.parts, part))

    def remove(self, ids: Collection[str]) -> Index:
        """This index without all rows of these ids.

        Raises:
            ValueError: an id that no row has, or nothing would be left.
        """
        gone = is_in(self.rows[ID], pa.array(list(ids), pa.string())).to_numpy()
        known = set(self.rows[ID].filter(gone).to_pylist())
        if missing := [id for id in ids if id not in known]:
            raise ValueError(f"{len(missing)} ids are not in the index, such as {missing[0]!r}: nothing was removed")
        if gone.all():
            raise ValueError(f"all {len(self):,} rows would be removed: delete the index instead")
        starts = np.cumsum([len(part.vectors) for part in self.parts])[:-1]
        parts = (_without(part, mask) for part, mask in zip(self.parts, np.split(gone, starts), strict=True))
        inverted = self.inverted
        if inverted is not None and gone[: inverted.count].any():
            inverted = None if gone[: inverted.count].all() else inverted.without(gone)
        return replace(self, parts=tuple(part for part in parts if len(part.vectors)), inverted=inverted)

    def approximate(self, lists: int | None = None, seed: int = 0) -> Index:
        """This index with an inverted file over all of its rows (extra `search`): faster, and it may miss a neighbour.

        Raises:
            ImportError: faiss is not installed.
        """
        num_lists = lists or lists_for(len(self))
        random = np.random.default_rng(seed)
        size = min(len(self), training_size(num_lists))
        chosen = torch.from_numpy(np.sort(random.choice(len(self), size, replace=False)))
        inverted = Inverted.build(self._take(chosen), self._blocks(0, None), num_lists)
        return replace(self, inverted=inverted)

    def search(
        self,
        queries: Float[Tensor, "Q D"],
        k: int = 10,
        *,
        model: str,
        where: Mapping[str, Any] | None = None,
        rerank: Rerank | None = None,
        depth: int = 128,
        probes: int = PROBES,
    ) -> list[list[Hit]]:
        """For each query the k best rows whose columns have the values of `where`; fewer where fewer have them.

        `rerank` scores the `depth` best anew, such as the matching head of ALBEF (arXiv 2107.07651, k_test = 128; see
        `mmformer.search.matching`); the others follow as they are.

        Raises:
            ValueError: vectors of another model, an unknown column, or scores that are not one for each hit.
        """
        found = self.nearest(queries, max(k, depth) if rerank else k, model=model, where=where, probes=probes)
        hits = [self._hits(rows, scores) for rows, scores in zip(found.rows, found.scores.tolist(), strict=True)]
        if rerank is not None:
            best = [given[:depth] for given in hits]
            anew = [_reordered(given, rerank(query, given) if given else []) for query, given in enumerate(best)]
            hits = [[*first, *given[depth:]] for first, given in zip(anew, hits, strict=True)]
        return [given[:k] for given in hits]

    def nearest(
        self,
        queries: Float[Tensor, "Q D"],
        k: int,
        *,
        model: str,
        where: Mapping[str, Any] | None = None,
        probes: int = PROBES,
    ) -> Found:
        """The numbers of the k rows of the largest cosine with each query, and the cosines."""
        self._check(queries, model)
        selected = matching(self.rows, where) if where else None
        found = [self._nearest(part, k, selected, probes) for part in _unit(queries).split(QUERIES)]
        if not found:
            return nothing(0, k)
        return Found(rows=torch.cat([f.rows for f in found]), scores=torch.cat([f.scores for f in found]))

    def _nearest(self, queries: Tensor, k: int, selected: np.ndarray | None, probes: int) -> Found:
        few = selected is not None and int(selected.sum()) <= FEW
        if self.inverted is None or few:
            return nearest(queries, self._blocks(0, selected), k)
        rough = self.inverted.search(queries, SCORED_AGAIN * k, probes, selected)
        vectors = self._take(rough.rows.clamp(min=0).flatten()).view(*rough.rows.shape, -1)
        scores = torch.einsum("qd,qkd->qk", queries, vectors)
        exact = replace(rough, scores=scores.masked_fill(rough.rows == NONE, -torch.inf)).best(k)
        found = nearest(queries, self._blocks(self.inverted.count, selected), k).beside(exact).best(k)
        short = (found.rows == NONE).any(1)  # the lists that were read held too few of the rows that are selected
        if short.any():
            rest = nearest(queries[short], self._blocks(0, selected), k)
            found.rows[short], found.scores[short] = rest.rows, rest.scores
        return found

    @cached_property
    def rows(self) -> pa.Table:
        """The table of all parts: `id`, `modality` and what else they have."""
        return joined([part.rows for part in self.parts])

    @property
    def dim(self) -> int:
        return self.parts[0].vectors.shape[1]

    def __len__(self) -> int:
        return sum(len(part.vectors) for part in self.parts)

    def save(self, folder: Path | str, origin: Path | str | None = None) -> Path:
        """Write it, and where its model lies (`origin`); parts that lie there already are not written again."""
        from mmformer.search.storage import save

        return save(self if origin is None else replace(self, origin=str(origin)), Path(folder))

    @staticmethod
    def load(folder: Path | str) -> Index:
        """Open what `save` wrote; the vectors stay on the disk until they are read.

        Raises:
            FileNotFoundError: no index there, or a file of it is missing.
            ValueError: a file is damaged.
        """
        from mmformer.search.storage import load

        return load(Path(folder))

    def _blocks(self, first: int, selected: np.ndarray | None) -> Iterator[Block]:
        """The rows from `first` on that are selected, a few thousand at a time."""
        start, size = 0, max(1, BLOCK // self.dim)
        for part in self.parts:
            stop = start + len(part.vectors)
            for low in range(max(start, first), stop, size):
                high = min(low + size, stop)
                numbers, vectors = torch.arange(low, high), part.vectors[low - start : high - start]
                if selected is not None:
                    kept = torch.from_numpy(selected[low:high])
                    numbers, vectors = numbers[kept], vectors[kept]
                if len(numbers):
                    yield numbers, vectors
            start = stop

    def _take(self, numbers: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        """The vectors of some rows in float32."""
        out = torch.empty(len(numbers), self.dim)
        start = 0
        for part in self.parts:
            inside = (numbers >= start) & (numbers < start + len(part.vectors))
            out[inside] = part.vectors[numbers[inside] - start].float()
            start += len(part.vectors)
        return out

    def _hits(self, rows: Int[Tensor, " k"], scores: Sequence[float]) -> list[Hit]:
        found = rows != NONE
        table = self.rows.take(pa.array(rows[found].numpy())).to_pylist()
        kept = [score for score, is_hit in zip(scores, found.tolist(), strict=True) if is_hit]
        return [Hit(id=row[ID], score=score, row=row) for row, score in zip(table, kept, strict=True)]

    def _check(self, vectors: Tensor, model: str) -> None:
        if model != self.model:
            raise ValueError(
                f"this index holds vectors of the model {self.model}, these are of {model}: embed with the model that "
                "the index was built with, or build it anew"
            )
        if vectors.shape[1] != self.dim:
            raise ValueError(f"vectors of {vectors.shape[1]} numbers, this index has vectors of {self.dim}")


def _part(vectors: Tensor, rows: pa.Table, dtype: torch.dtype) -> Part:
    if not len(vectors):
        raise ValueError("0 vectors: an index needs at least one")
    unit = torch.empty(vectors.shape, dtype=dtype)
    size = max(1, BLOCK // vectors.shape[1])
    for start in range(0, len(vectors), size):  # a few at a time, as all of them once more may not fit
        unit[start : start + size] = _unit(vectors[start : start + size], start)
    return Part(vectors=unit, rows=rows)


def _unit(vectors: Tensor, start: int = 0) -> Float[Tensor, "n D"]:
    """At length 1, on the CPU and in float32; `start` is the number of the first, for errors."""
    vectors = vectors.detach().float().cpu()
    wrong = ~vectors.isfinite().all(1) | ~vectors.any(1)
    if wrong.any():
        raise ValueError(
            f"vector {start + int(wrong.nonzero()[0])} is zero, infinite or NaN and has no direction: leave out "
            "samples that the model could not read"
        )
    return normalize(vectors, dim=1)


def _without(part: Part, gone: np.ndarray) -> Part:
    if not gone.any():
        return part
    kept = torch.from_numpy(~gone)
    return Part(vectors=part.vectors[kept], rows=part.rows.filter(pa.array(~gone)))


def _reordered(hits: Sequence[Hit], scores: Sequence[float]) -> list[Hit]:
    if len(scores) != len(hits):
        raise ValueError(f"the re-ranking gave {len(scores)} scores for {len(hits)} hits: give one for each")
    new = [replace(hit, score=float(score)) for hit, score in zip(hits, scores, strict=True)]
    return sorted(new, key=lambda hit: -hit.score)
