"""Who sees whom: one rule on what tokens are, applied to one pair of token sequences."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmformer.patterns import Pattern, Window
from mmformer.tokens import Layout, Tokens, modality_id

Made = TypeVar("Made")
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Visibility:
    """A rule that says which keys a query sees, beyond "those of its own segment".

    `causal`: no key of a later time. All tokens of a picture share one time, so a picture in front of a text is seen
    whole and sees itself whole (prefix attention needs no further rule).
    `window`: a key of the same modality is seen when no coordinate (time, row, column) differs by more than this.
    `sees`: for each modality named, the modalities that its tokens see; others see everything.
    `current`: a key holds from its time until another, its row: what a text saw last (`mmformer.nn.media.in_time`).
    `patterns`: a key of the same modality is seen when each of them allows it (`mmformer.patterns`: dilated windows,
    global tokens, blocks); one, or several.
    """

    causal: bool = False
    window: int | None = None
    sees: Mapping[str, Iterable[str]] | tuple[tuple[str, tuple[str, ...]], ...] | None = None
    current: bool = False
    patterns: Pattern | Sequence[Pattern] = ()
    _numbers: tuple[tuple[int, tuple[int, ...]], ...] = field(init=False, repr=False, compare=False)
    _rules: tuple[Pattern, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        window = () if self.window is None else (Window(self.window),)
        object.__setattr__(self, "patterns", self._patterns)
        object.__setattr__(self, "_rules", (*window, *self._patterns))
        pairs = self.sees.items() if isinstance(self.sees, Mapping) else self.sees or ()
        object.__setattr__(self, "sees", tuple(sorted((name, tuple(sorted(seen))) for name, seen in pairs)))
        numbers = tuple((modality_id(name), tuple(map(modality_id, seen))) for name, seen in self.sees or ())
        object.__setattr__(self, "_numbers", numbers)  # compiled code cannot hash names

    @property
    def full(self) -> bool:
        """Whether the rule leaves every key of the segment visible."""
        return not (self.causal or self.current) and len(self.sees or ()) + len(self._rules) == 0

    @property
    def rules(self) -> tuple[Pattern, ...]:
        """The window and the patterns, all of which must allow what is seen among tokens of one modality."""
        return self._rules

    @property
    def _patterns(self) -> tuple[Pattern, ...]:
        return tuple(self.patterns) if isinstance(self.patterns, Sequence) else (self.patterns,)

    def __and__(self, other: Visibility) -> Visibility:
        """The rule that allows what both allow."""
        windows = [w for w in (self.window, other.window) if w is not None]
        mine, theirs = dict(self.sees or ()), dict(other.sees or ())
        sees = {name: set(mine.get(name, theirs.get(name, ()))) for name in {*mine, *theirs}}
        for name in {*mine} & {*theirs}:
            sees[name] = set(mine[name]) & set(theirs[name])
        patterns = tuple(dict.fromkeys((*self._patterns, *other._patterns)))
        return Visibility(
            self.causal or other.causal, min(windows, default=None), sees, self.current or other.current, patterns
        )

    def allows(
        self,
        query_modality: Int[Tensor, "*q"],
        query_position: Int[Tensor, "*q 3"],
        key_modality: Int[Tensor, "*k"],
        key_position: Int[Tensor, "*k 3"],
        last: Int[Tensor, "*q"] | None = None,
    ) -> Bool[Tensor, "*qk"]:
        """Whether each query sees each key, for shapes that broadcast; segments are not looked at.

        `last` is the last time in each query's segment, which some patterns ask for.
        """
        seen = torch.ones_like(query_modality == key_modality)
        if self.causal:
            seen = seen & (key_position[..., 0] <= query_position[..., 0])
        for rule in self.rules:
            near = rule.allows(query_position, key_position, last) | (query_modality != key_modality)
            anywhere = rule.is_global(query_modality, query_position) | rule.is_global(key_modality, key_position)
            seen = seen & (near | anywhere)
        if self.current:
            time = query_position[..., 0]
            seen = seen & (key_position[..., 0] <= time) & (time < key_position[..., 1])
        for number, others in self._numbers:
            known = torch.zeros_like(seen)
            for other in others:
                known = known | (key_modality == other)
            seen = seen & (known | (query_modality != number))
        return seen


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring segments that one dense attention call serves: `count` of up to `queries` x `keys` tokens.

    The spans say which stretch of the row they lie in. `query` and `key` index that stretch, a short segment repeating
    its last token; None where all segments are equally long and adjoin. `out` picks the real queries. `mask` is true
    where a query sees a key, and `sees` where it sees any; None stands for true everywhere.
    """

    count: int
    queries: int
    keys: int
    query_span: slice
    key_span: slice
    query: Int[Tensor, ...] | None
    key: Int[Tensor, ...] | None
    out: Int[Tensor, ...] | None
    mask: Bool[Tensor, "n 1 _ Lk"] | None
    sees: Bool[Tensor, "n 1 Lq 1"] | None


# Query-key pairs whose arithmetic costs about as much as one more attention call (benchmarks/grouping.py).
CALL_COST = 2048


def plan_groups(queries: np.ndarray, keys: np.ndarray) -> list[tuple[int, int]]:
    """Split neighbouring segments into runs (start, stop), so that padding and calls together cost least (greedy)."""
    runs, start = [], 0
    while start < len(queries):
        stop, wide, deep = start + 1, queries[start], keys[start]
        while stop < len(queries):
            if (keys[stop] == 0) != (deep == 0):
                break
            wider, deeper = max(wide, queries[stop]), max(deep, keys[stop])
            count = stop - start
            waste = count * (wider * deeper - wide * deep) + wider * deeper - queries[stop] * keys[stop]
            if waste > CALL_COST:
                break
            stop, wide, deep = stop + 1, wider, deeper
        runs.append((start, stop))
        start = stop
    return runs


class Sight:
    """A rule applied to queries and keys: the same visibility as a dense mask, as groups, or as a block mask.

    Each form is made when a kernel first asks for it and kept, so that the layers of a Transformer share it.
    """

    def __init__(self, visibility: Visibility, query: Tokens, key: Tokens):
        if (query.layout is None) != (key.layout is None):
            raise ValueError("queries and keys must both be packed or both be padded")
        self.visibility = visibility
        self.query, self.key = query, key
        self._kept: dict[Hashable, Any] = {}

    @property
    def packed(self) -> bool:
        return self.query.layout is not None

    @cached_property
    def owners(self) -> tuple[Int[Tensor, "B Tq"], Int[Tensor, "B Tk"]]:
        """What must be equal for a query to see a key: the segment, or the sample where the segments differ."""
        if self.query.layout is self.key.layout:
            return self.query.segment, self.key.segment
        return self.query.sample(), self.key.sample()

    @cached_property
    def dense(self) -> Bool[Tensor, "B 1 Tq Tk"]:
        """The whole mask; quadratic in memory."""
        mine, theirs = self.owners
        same = (mine[:, :, None] == theirs[:, None, :]) & (mine >= 0)[:, :, None]
        if not self.visibility.full:
            same = same & self.visibility.allows(
                self.query.modality[:, :, None],
                self.query.position[:, :, None],
                self.key.modality[:, None],
                self.key.position[:, None],
                None if self.last is None else self.last[:, :, None],
            )
        return same[:, None]

    @cached_property
    def last(self) -> Int[Tensor, "B Tq"] | None:
        """The last time of the keys that belong with each query, 0 where there are none; None where no pattern asks."""
        if not self.visibility.patterns:
            return None
        mine, theirs = self.owners
        sizes = [1 if t.layout is None else max(len(t.layout.lengths), t.num_samples) for t in (self.query, self.key)]
        rows = theirs.new_zeros(len(mine), 1 + max(*sizes, len(mine), theirs.shape[1]))
        latest = rows.scatter_reduce(1, theirs + 1, self.key.position[..., 0], "amax")
        return latest.gather(1, mine + 1)

    def kept(self, make: Callable[..., Made], *options: Hashable) -> Made:
        """What a kernel makes of this sight and some options, made once for all layers that ask."""
        if (make, options) not in self._kept:
            self._kept[make, options] = make(self, *options)
        return self._kept[make, options]

    def mask_mod(self) -> MaskMod:
        """The rule as a closure for FlexAttention."""
        mine, theirs = self.owners
        rule, query, key, last = self.visibility, self.query, self.key, self.last
        full = rule.full  # compiled code cannot ask whether there are patterns

        def seen(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = (mine[b, q] == theirs[b, k]) & (mine[b, q] >= 0)
            if full:
                return same
            latest = None if last is None else last[b, q]
            return same & rule.allows(
                query.modality[b, q], query.position[b, q], key.modality[b, k], key.position[b, k], latest
            )

        return lambda b, h, q, k: seen(b, q, k)  # FlexAttention counts the parameters, so no wrapper may hide them

    @cached_property
    def block_mask(self):
        """The rule as a FlexAttention block mask."""
        from torch.nn.attention.flex_attention import create_block_mask

        rows, width = self.query.segment.shape
        device = str(self.query.x.device)
        return create_block_mask(self.mask_mod(), rows, None, width, self.key.segment.shape[1], device=device)

    @cached_property
    def _extents(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Start and length of each query segment, and of the keys that belong to it."""
        query, key = self.query.layout, self.key.layout
        if query is None or key is None:
            raise ValueError("only packed tokens have segments of known extent; use Sight.dense for padded ones")
        length = np.asarray(query.lengths, dtype=np.int64)
        if query is key:
            return query.offsets[:-1], length, query.offsets[:-1], length
        start, size = _extent_of_samples(key)
        samples = np.asarray(query.samples, dtype=np.int64)
        return query.offsets[:-1], length, start[samples], size[samples]

    @cached_property
    def pairs(self) -> int:
        """Query-key pairs that dense attention computes: within segments, or of all that is in a padded row."""
        if not self.packed:
            return int(self.query.segment.numel() * self.key.segment.shape[1])
        _, queries, _, keys = self._extents
        return int((queries * keys).sum())

    @cached_property
    def cumulative(self) -> tuple[Int[Tensor, " S"], Int[Tensor, " S"], int, int]:
        """Cumulative lengths of queries and keys and the longest of each, for variable-length flash attention.

        Raises:
            ValueError: the keys do not lie in the order of the queries.
        """
        _, queries, start, keys = self._extents
        ends = np.cumsum(keys)
        if not np.array_equal((start + keys)[keys > 0], ends[keys > 0]):
            raise ValueError("the keys' samples are in another order than the queries': merge them with order=")
        device = self.query.x.device
        bounds = [torch.from_numpy(np.concatenate([[0], np.cumsum(n)])).int().to(device) for n in (queries, keys)]
        return bounds[0], bounds[1], int(queries.max(initial=0)), int(keys.max(initial=0))

    @cached_property
    def groups(self) -> list[Group]:
        """The packed row cut into dense attention calls, in row order and without a gap."""
        query_start, queries, key_start, keys = self._extents
        runs = plan_groups(queries, keys)
        return [self._group(*(a[i:j] for a in (query_start, queries, key_start, keys))) for i, j in runs]

    def _group(self, query_start: np.ndarray, queries: np.ndarray, key_start: np.ndarray, keys: np.ndarray) -> Group:
        device = self.query.x.device
        wide, deep, count = int(queries.max()), int(keys.max()), len(queries)
        query, even_queries = _index(query_start, queries, wide)
        key, even_keys = _index(key_start, keys, deep)
        mask = sees = None
        if deep and not (self.visibility.full and even_keys):
            real = torch.from_numpy(np.arange(deep) < keys[:, None]).to(device)
            mask = real[:, None, None, :]
            if not self.visibility.full:
                q = _on(query, device).view(count, wide, 1)
                k = _on(key, device).view(count, 1, deep)
                last = None if self.last is None else self.last[0][q]
                mask = mask & self.visibility.allows(
                    self.query.modality[0][q], self.query.position[0][q],
                    self.key.modality[0][k], self.key.position[0][k], last)[:, None]  # fmt: skip
                sees = mask.any(-1, keepdim=True)
                sees = None if sees.all() else sees
        out = None
        if not even_queries:
            out = torch.from_numpy(np.flatnonzero(np.arange(wide) < queries[:, None])).to(device)
        query_span, key_span = _span(query_start, queries), _span(key_start, keys)
        return Group(
            count, wide, deep, query_span, key_span,
            None if even_queries else _on(query - query_span.start, device),
            None if even_keys and _adjoin(key_start, keys) else _on(key - key_span.start, device),
            out, mask, sees,
        )  # fmt: skip


def _extent_of_samples(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of each sample's tokens; length 0 where it has none.

    Raises:
        ValueError: a sample's segments do not adjoin.
    """
    start = np.zeros(layout.num_samples, dtype=np.int64)
    size = np.zeros(layout.num_samples, dtype=np.int64)
    for sample, at, length in zip(layout.samples, layout.offsets[:-1].tolist(), layout.lengths, strict=True):
        if size[sample] and start[sample] + size[sample] != at:
            raise ValueError(f"sample {sample} lies in parts: merge the context by sample first")
        start[sample] = start[sample] if size[sample] else at
        size[sample] += length
    return start, size


def _index(start: np.ndarray, lengths: np.ndarray, width: int) -> tuple[np.ndarray, bool]:
    """Token index of each cell of a (segments, width) block, short segments repeating their last token."""
    step = np.minimum(np.arange(width), np.maximum(lengths[:, None] - 1, 0))
    return (start[:, None] + step).reshape(-1), bool((lengths == width).all())


def _adjoin(start: np.ndarray, lengths: np.ndarray) -> bool:
    return bool((start[1:] == (start + lengths)[:-1]).all())


def _span(start: np.ndarray, lengths: np.ndarray) -> slice:
    return slice(int(start.min()), int((start + lengths).max()))


def _on(index: np.ndarray, device: torch.device) -> Int[Tensor, " n"]:
    return torch.from_numpy(np.ascontiguousarray(index)).to(device, non_blocking=True)


class Sights:
    """The sights of one pair of token sequences, each made once however many layers ask for it."""

    def __init__(self, query: Tokens, key: Tokens, visibility: Visibility | None = None):
        self.query, self.key = query, key
        self.visibility = visibility or Visibility()
        self.known = False
        """Whether keys and values are those of an earlier pass, which a memory has."""
        self._made: dict[Visibility, Sight] = {}

    def joined(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the queries' own tokens, behind those of earlier passes where a memory has them."""
        return k, v

    def given(self, make: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Keys and values of a context, as made here or, where a memory has them, in an earlier pass."""
        return make()

    @cached_property
    def keyless(self) -> Bool[Tensor, "B T"] | None:
        """Which queries are of a sample that has no key at all; None where none is, as packed rows tell."""
        query, key = self.query.layout, self.key.layout
        if query is None or key is None:
            return ~self.key.valid.any(1, keepdim=True).expand_as(self.query.segment)
        lacking = ~np.isin(query.samples, key.samples)
        if not lacking.any():
            return None
        out = np.zeros(self.query.x.shape[1], dtype=bool)
        out[: query.total] = np.repeat(lacking, query.lengths)
        return torch.from_numpy(out)[None].to(self.query.x.device, non_blocking=True)

    def under(self, visibility: Visibility | None) -> Sight:
        """The sight under the common rule and a layer's own."""
        rule = self.visibility if visibility is None else self.visibility & visibility
        if rule not in self._made:
            self._made[rule] = Sight(rule, self.query, self.key)
        return self._made[rule]
