"""Token sequences: vectors that know what they are.

A packed sequence is one row that holds every sample of the batch end to end (B = 1); a padded one has a row a
sample. Packed is the layout of training, padded that of export and of backbones that know nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PADDING = -1


def modality_id(name: str) -> int:
    """The number that marks tokens of a modality: a fixed hash of its name, so that the set stays open."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


LATENT = "latent"
"""Name of learned tokens that belong to no input: class tokens, queries, bottlenecks."""


@dataclass(frozen=True)
class Layout:
    """Where the segments of a packed row stand, in Python integers.

    Segment i holds `lengths[i]` tokens of sample `samples[i]`; segments follow one another without a gap, and what is
    left of the row after the last one is padding. `num_samples` counts all samples of the batch, also those that
    have no token here. `places` are those of the segments in the sequence of items that their sample is, over all
    modalities; empty where there is no such order.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    num_samples: int
    places: tuple[int, ...] = ()

    @cached_property
    def offsets(self) -> np.ndarray:
        """Start of each segment, and the end of the last."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)

    @property
    def total(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def sample_of_token(self) -> np.ndarray:
        return np.repeat(np.asarray(self.samples, dtype=np.int64), self.lengths)

    def order(self, ranks: np.ndarray) -> np.ndarray:
        """The segments by the rank of their sample, then by their place; otherwise as they are."""
        return np.lexsort((_places(self), ranks[np.asarray(self.samples, dtype=np.int64)]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A batch of token sequences: B rows, T tokens, D channels.

    `segment` says which tokens belong together. Attention never crosses it, and PADDING (-1) belongs to none.
    A padded batch has one segment (0) a row; a packed one has one row of many, and its `layout` says the same on the
    host. `position` is (time, row, column): causality and order follow time, all tokens of a picture share one.
    """

    x: Float[Tensor, "B T D"]
    modality: Int[Tensor, "B T"]
    position: Int[Tensor, "B T 3"]
    segment: Int[Tensor, "B T"]
    layout: Layout | None = field(default=None)

    def with_x(self, x: Float[Tensor, "B T E"]) -> Tokens:
        return replace(self, x=x)

    @property
    def valid(self) -> Bool[Tensor, "B T"]:
        return self.segment >= 0

    @property
    def num_samples(self) -> int:
        return self.x.shape[0] if self.layout is None else self.layout.num_samples

    def sample(self) -> Int[Tensor, "B T"]:
        """The sample of each token; PADDING for padding."""
        if self.layout is None:
            rows = torch.arange(self.x.shape[0], device=self.x.device)[:, None].expand_as(self.segment)
            return torch.where(self.valid, rows, PADDING)
        out = torch.full(self.segment.shape, PADDING, dtype=torch.long)
        out[0, : self.layout.total] = torch.from_numpy(self.layout.sample_of_token)
        return out.to(self.x.device, non_blocking=True)


def is_one_of(tokens: Tokens, modalities: Sequence[str]) -> Bool[Tensor, "B T"]:
    """Which tokens are of the named modalities."""
    found = torch.zeros_like(tokens.modality, dtype=torch.bool)
    for name in modalities:
        found = found | (tokens.modality == modality_id(name))
    return found


def segments(layout: Layout, width: int, device: torch.device) -> Int[Tensor, "1 T"]:
    """The `segment` field of a packed row of `width` tokens."""
    out = np.full(width, PADDING, dtype=np.int64)
    out[: layout.total] = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
    return torch.from_numpy(out)[None].to(device, non_blocking=True)


def latent_tokens(vectors: Float[Tensor, "K D"], num_samples: int, packed: bool) -> Tokens:
    """The same K learned vectors for every sample."""
    count, device = len(vectors), vectors.device
    shape = (1, num_samples * count) if packed else (num_samples, count)
    layout = Layout(tuple(range(num_samples)), (count,) * num_samples, num_samples) if packed else None
    owner = torch.zeros(shape, dtype=torch.long, device=device)
    return Tokens(
        x=vectors.expand(num_samples, -1, -1).reshape(*shape, vectors.shape[1]),
        modality=torch.full(shape, modality_id(LATENT), device=device),
        position=torch.zeros(*shape, 3, dtype=torch.long, device=device),
        segment=segments(layout, shape[1], device) if layout else owner,
        layout=layout,
    )


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate arange(start, start + length) for every pair."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def merge(
    streams: Sequence[Tokens], order: Sequence[int] | None = None, sequential: bool = False, multiple: int = 1
) -> Tokens:
    """Join token sequences by sample: what each sample has in the streams becomes one segment, in the streams' order.

    Items that have a place in their sample stand by it, behind those of streams that have none. Packed rows are sorted
    by sample length (or by `order`, a permutation of samples), so that equal lengths adjoin. Samples without any token
    get no segment. `sequential` renumbers time so that each item starts after the one before it, as a causal sequence
    needs; a picture takes one tick. `multiple` rounds the packed width up, so that compiled code sees few shapes.

    Raises:
        ValueError: streams of both kinds, packed and padded, or of different batches.
    """
    packed = [t for t in streams if t.layout is not None]
    if packed and len(packed) != len(streams):
        raise ValueError(f"{len(packed)} of {len(streams)} streams are packed: pack all of them or none")
    if any(t.num_samples != streams[0].num_samples for t in streams):
        raise ValueError(f"streams of {[t.num_samples for t in streams]} samples: all must come from one batch")
    if not packed:
        return Tokens(
            x=torch.cat([t.x for t in streams], 1),
            modality=torch.cat([t.modality for t in streams], 1),
            position=torch.cat(_times_in_rows(streams) if sequential else [t.position for t in streams], 1),
            segment=torch.cat([t.segment for t in streams], 1),
        )
    plan = _plan([t.layout for t in packed if t.layout], [t.x.shape[1] for t in packed], order)
    width = -(-plan.layout.total // multiple) * multiple
    device = streams[0].x.device
    gather = torch.zeros(width, dtype=torch.long)
    gather[: plan.layout.total] = torch.from_numpy(plan.tokens)
    gather = gather.to(device, non_blocking=True)
    position = torch.cat([t.position[0] for t in streams]).index_select(0, gather)
    return Tokens(
        x=torch.cat([t.x[0] for t in streams]).index_select(0, gather)[None],
        modality=torch.cat([t.modality[0] for t in streams]).index_select(0, gather)[None],
        position=(_times_in_items(position, plan) if sequential else position)[None],
        segment=segments(plan.layout, width, device),
        layout=plan.layout,
    )


@dataclass(frozen=True)
class _Plan:
    """How packed streams are joined: which of their tokens goes where, and the layout that comes of it.

    Item i of the joined row has `lengths[i]` tokens and belongs to the sample whose first item is `first[i]`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    layout: Layout


def _plan(layouts: Sequence[Layout], widths: Sequence[int], order: Sequence[int] | None) -> _Plan:
    num_samples = layouts[0].num_samples
    base = np.concatenate([[0], np.cumsum(widths)[:-1]])
    items = Layout(
        samples=tuple(s for a in layouts for s in a.samples),
        lengths=tuple(n for a in layouts for n in a.lengths),
        num_samples=num_samples,
        places=tuple(np.concatenate([_places(a) for a in layouts]).tolist()),
    )
    sample, length = np.asarray(items.samples, dtype=np.int64), np.asarray(items.lengths, dtype=np.int64)
    start = np.concatenate([a.offsets[:-1] + b for a, b in zip(layouts, base, strict=True)])
    total = np.bincount(sample, weights=length, minlength=num_samples).astype(np.int64)
    ranked = np.argsort(total, kind="stable") if order is None else np.asarray(order, dtype=np.int64)
    by = items.order(_ranks(ranked))
    kept = ranked[total[ranked] > 0]
    layout = Layout(tuple(kept.tolist()), tuple(total[kept].tolist()), num_samples)
    first = np.searchsorted(_ranks(ranked)[sample[by]], _ranks(ranked)[sample[by]])
    return _Plan(_spans(start[by], length[by]), length[by], first, layout)


def _places(layout: Layout) -> np.ndarray:
    """The place of each segment; -1, in front of all others, where there is none."""
    return np.asarray(layout.places or (-1,) * len(layout.samples), dtype=np.int64)


def _ranks(order: np.ndarray) -> np.ndarray:
    """The inverse of a permutation."""
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def _times_in_items(position: Int[Tensor, "T 3"], plan: _Plan) -> Int[Tensor, "T 3"]:
    """Positions of a joined row whose time starts, in each item, after the last of the item before it."""
    device, total = position.device, plan.layout.total
    item = torch.from_numpy(np.repeat(np.arange(len(plan.lengths)), plan.lengths)).to(device, non_blocking=True)
    ticks = position.new_zeros(len(plan.lengths)).scatter_reduce(0, item, position[:total, 0] + 1, "amax")
    before = ticks.cumsum(0) - ticks
    before = before - before[torch.from_numpy(plan.first).to(device, non_blocking=True)]
    time = torch.cat([position[:total, 0] + before[item], position[total:, 0]])
    return torch.cat([time[:, None], position[:, 1:]], -1)


def _times_in_rows(streams: Sequence[Tokens]) -> list[Int[Tensor, "B T 3"]]:
    """Positions of padded streams whose time starts, in each row, after the last of the streams before it."""
    offset = torch.zeros_like(streams[0].segment[:, :1])
    out = []
    for t in streams:
        time = t.position[..., 0] + offset
        out.append(torch.cat([time[..., None], t.position[..., 1:]], -1))
        last = torch.where(t.valid, time + 1, 0)
        offset = torch.maximum(offset, torch.nn.functional.pad(last, (0, 1)).amax(1, keepdim=True))
    return out


def find(tokens: Tokens, modality: str, part: Layout) -> tuple[Int[Tensor, " n"], np.ndarray]:
    """Where the tokens of one modality stand in a sequence that was merged from them, without asking the device.

    `part` is their own layout, of n tokens. Gives the indices into the flattened (B T) sequence, ascending, and for
    each the token of `part` that stands there.
    """
    chosen = ((tokens.modality == modality_id(modality)) & tokens.valid).flatten()
    where = torch.argsort((~chosen).to(torch.uint8), stable=True)[: part.total]
    if tokens.layout == part:  # not merged: the encoder's own
        return where, np.arange(part.total)
    ranks = np.arange(part.num_samples)
    if tokens.layout is not None:
        ranks[np.asarray(tokens.layout.samples, dtype=np.int64)] = np.arange(len(tokens.layout.samples))
    by = part.order(ranks)
    return where, _spans(part.offsets[:-1][by], np.asarray(part.lengths, dtype=np.int64)[by])


def to_padded(tokens: Tokens) -> Tokens:
    """One row a sample, as wide as the longest; a sample with several segments gets them one after another."""
    if tokens.layout is None:
        return tokens
    layout, device = tokens.layout, tokens.x.device
    length = np.bincount(layout.samples, weights=layout.lengths, minlength=layout.num_samples).astype(np.int64)
    width = int(length.max(initial=min(1, tokens.x.shape[1])))
    by = layout.order(np.arange(layout.num_samples))
    source = _spans(layout.offsets[:-1][by], np.asarray(layout.lengths, dtype=np.int64)[by])
    target = _spans(np.arange(layout.num_samples) * width, length)
    shape = (layout.num_samples, width)
    gather = torch.zeros(shape[0] * width, dtype=torch.long)
    gather[torch.from_numpy(target)] = torch.from_numpy(source)
    valid = torch.zeros(shape[0] * width, dtype=torch.bool)
    valid[torch.from_numpy(target)] = True
    gather, valid = gather.to(device), valid.to(device).view(shape)

    def spread(values: Tensor, fill: int) -> Tensor:
        rows = values[0].index_select(0, gather).view(*shape, *values.shape[2:])
        return torch.where(valid.view(*shape, *[1] * (rows.ndim - 2)), rows, fill)

    return Tokens(
        x=spread(tokens.x, 0),
        modality=spread(tokens.modality, 0),
        position=spread(tokens.position, 0),
        segment=torch.where(valid, 0, PADDING),
    )


def to_packed(tokens: Tokens, lengths: Sequence[int]) -> Tokens:
    """One row of all samples; `lengths[b]` is the number of tokens of row b, which must come before its padding."""
    if tokens.layout is not None:
        return tokens
    kept = [b for b in sorted(range(len(lengths)), key=lambda b: lengths[b]) if lengths[b]]
    layout = Layout(tuple(kept), tuple(lengths[b] for b in kept), len(lengths))
    starts = np.asarray(kept, dtype=np.int64) * tokens.x.shape[1]
    gather = torch.from_numpy(_spans(starts, np.asarray(layout.lengths, dtype=np.int64))).to(tokens.x.device)
    return Tokens(
        x=tokens.x.flatten(0, 1).index_select(0, gather)[None],
        modality=tokens.modality.flatten().index_select(0, gather)[None],
        position=tokens.position.flatten(0, 1).index_select(0, gather)[None],
        segment=segments(layout, layout.total, tokens.x.device),
        layout=layout,
    )


def take(tokens: Tokens, samples: Sequence[int]) -> Tokens:
    """The tokens of the named samples as a batch of their own: sample i is what `samples[i]` was, repeats allowed.

    So one batch's texts and pictures can be paired in any way. Host arithmetic for packed tokens, nothing is asked.

    Raises:
        IndexError: a sample that the batch does not have.
    """
    if samples and not 0 <= min(samples) <= max(samples) < tokens.num_samples:
        raise IndexError(f"samples {min(samples)} to {max(samples)} of a batch of {tokens.num_samples}")
    chosen, layout, device = np.asarray(samples, dtype=np.int64), tokens.layout, tokens.x.device
    if layout is None:
        rows = torch.from_numpy(chosen).to(device, non_blocking=True)
        fields = (tokens.x, tokens.modality, tokens.position, tokens.segment)
        x, modality, position, segment = (value.index_select(0, rows) for value in fields)
        return Tokens(x=x, modality=modality, position=position, segment=segment)
    owner = np.asarray(layout.samples, dtype=np.int64)
    count = np.bincount(owner, minlength=layout.num_samples)
    start = np.cumsum(count) - count
    by = np.argsort(owner, kind="stable")[_spans(start[chosen], count[chosen])]
    lengths = np.asarray(layout.lengths, dtype=np.int64)[by]
    taken = Layout(
        samples=tuple(np.repeat(np.arange(len(chosen)), count[chosen]).tolist()),
        lengths=tuple(lengths.tolist()),
        num_samples=len(chosen),
        places=tuple(layout.places[i] for i in by) if layout.places else (),
    )
    gather = torch.from_numpy(_spans(layout.offsets[:-1][by], lengths)).to(device, non_blocking=True)
    return Tokens(
        x=tokens.x.index_select(1, gather),
        modality=tokens.modality.index_select(1, gather),
        position=tokens.position.index_select(1, gather),
        segment=segments(taken, taken.total, device),
        layout=taken,
    )


torch.export.register_dataclass(Tokens, serialized_type_name="mmformer.Tokens")
