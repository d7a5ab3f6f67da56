"""What a causal pass leaves behind, so that the next one computes only what is new: the cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from mmformer.tokens import PADDING, Layout, Tokens
from mmformer.visibility import Sight, Sights, Visibility

SPARE = 32
"""Room for so many tokens is made beyond half of what there is."""

Spread = Callable[[Shaped[Tensor, "_ T ..."]], Shaped[Tensor, "B W ..."]]
"""Values of tokens, packed or padded, with a row for each sample."""


class Memory:
    """Keys and values of all that the Transformers of one model have read, while the modality `grows` gets longer.

    A first pass, packed or padded, fills it. The tokens of a later pass are padded, a row for each sample, and see all
    that came before under the same rule. The tensors are padded too: (samples, tokens, heads, channels).

    What comes out is what one pass over everything gives, as long as nothing read before may see what comes later: a
    rule that allows it is an error.
    """

    def __init__(self, grows: str):
        self.grows = grows
        self._pasts: dict[nn.Module, Past] = {}

    def of(self, transformer: nn.Module) -> Past:
        """What one Transformer remembers."""
        return self._pasts.setdefault(transformer, Past())

    def select(self, rows: Sequence[int]) -> Memory:
        """A memory of the samples named, in this order, each as often as it is named."""
        chosen = Memory(self.grows)
        chosen._pasts = {owner: past.select(rows) for owner, past in self._pasts.items()}
        return chosen


class Growing:
    """Rows (B, T, ...) that get longer; room is made in advance, so that a step costs what it adds."""

    def __init__(self, room: Shaped[Tensor, "B C ..."], length: int):
        self._room, self.length = room, length

    @property
    def all(self) -> Shaped[Tensor, "B T ..."]:
        return self._room[:, : self.length]

    def append(self, more: Shaped[Tensor, "B n ..."]) -> Shaped[Tensor, "B T ..."]:
        """All that there is, with what is new."""
        stop = self.length + more.shape[1]
        if stop > self._room.shape[1]:
            room = self._room.new_empty(len(more), stop + stop // 2 + SPARE, *more.shape[2:])
            room[:, : self.length] = self.all
            self._room = room
        self._room[:, self.length : stop] = more
        self.length = stop
        return self.all

    def select(self, rows: Int[Tensor, " n"]) -> Growing:
        return Growing(self._room.index_select(0, rows), self.length)


@dataclass(frozen=True)
class Keys:
    """What the keys are tokens of, without their vectors."""

    modality: Growing
    position: Growing
    segment: Growing

    @classmethod
    def of(cls, padded: Tokens) -> Keys:
        fields = (padded.modality, padded.position, padded.segment)
        return cls(*[Growing(field, field.shape[1]) for field in fields])

    def append(self, tokens: Tokens) -> None:
        for field, more in zip(self._fields, (tokens.modality, tokens.position, tokens.segment), strict=True):
            field.append(more)

    def select(self, rows: Int[Tensor, " n"]) -> Keys:
        return Keys(*[field.select(rows) for field in self._fields])

    def tokens(self) -> Tokens:
        """Padded tokens of no channels."""
        modality, position, segment = (field.all for field in self._fields)
        x = torch.empty(*segment.shape, 0, device=segment.device)
        return Tokens(x=x, modality=modality, position=position, segment=segment)

    @property
    def _fields(self) -> tuple[Growing, Growing, Growing]:
        return self.modality, self.position, self.segment


class Past:
    """What one Transformer remembers: keys and values of each call of attention, in the order of the calls.

    A layer that is applied several times makes a call each time. Those of a context are made once, and do not grow.
    """

    def __init__(self):
        self.keys: Keys | None = None
        self.context: Keys | None = None
        self.own: list[tuple[Growing, Growing]] = []
        self.crossed: list[tuple[Tensor, Tensor]] = []
        self._rows: tuple[int, ...] = ()
        self._is_second = False

    def sights(self, tokens: Tokens, context: Tokens | None, rule: Visibility) -> tuple[Sights, Sights | None]:
        """Who sees whom in the next pass, whose keys and values are kept; only the first one has a context.

        Raises:
            ValueError: later tokens that are packed, or that earlier ones could have seen.
        """
        if self.keys is None:
            return self._first(tokens, context, rule)
        if tokens.layout is not None:
            raise ValueError("packed tokens behind remembered ones: pad them, a row for each sample")
        if self._is_second:
            _check_unseen(self.keys.tokens(), tokens, rule)
        self._is_second = False
        self.keys.append(tokens)
        own = _OwnSights(self, tokens, self.keys.tokens(), rule, None)
        if self.context is None:
            return own, None
        return own, _ContextSights(self, _padded(tokens, one_segment=True)[0], self.context.tokens(), None)

    def next_time(self) -> Int[Tensor, " B"]:
        """The first time behind what each sample has; 0 where it has nothing.

        Raises:
            ValueError: nothing was read yet.
        """
        if self.keys is None:
            raise ValueError("this memory is empty: the first pass comes before what follows it")
        time = torch.where(self.keys.segment.all >= 0, self.keys.position.all[..., 0] + 1, 0)
        return torch.nn.functional.pad(time, (0, 1)).amax(1)

    def select(self, rows: Sequence[int]) -> Past:
        chosen = Past()
        if self.keys is None:
            return chosen
        index = torch.tensor(rows, dtype=torch.long, device=self.keys.segment.all.device)
        chosen._rows, chosen._is_second = tuple(self._rows[row] for row in rows), self._is_second
        chosen.keys = self.keys.select(index)
        chosen.own = [(k.select(index), v.select(index)) for k, v in self.own]
        if chosen._rows == self._rows:  # beams of one sample share its context
            chosen.context, chosen.crossed = self.context, self.crossed
        elif self.context is not None:
            chosen.context = self.context.select(index)
            chosen.crossed = [(k.index_select(0, index), v.index_select(0, index)) for k, v in self.crossed]
        return chosen

    def _first(self, tokens: Tokens, context: Tokens | None, rule: Visibility) -> tuple[Sights, Sights | None]:
        padded, spread = _padded(tokens)
        self.keys, self._rows, self._is_second = Keys.of(padded), tuple(range(len(padded.segment))), True
        own = _OwnSights(self, tokens, tokens, rule, spread)
        if context is None:
            return own, None
        padded, spread = _padded(context, one_segment=True)
        self.context = Keys.of(padded)
        return own, _ContextSights(self, tokens, context, spread)


class _OwnSights(Sights):
    """Tokens over themselves and those of earlier passes; `spread` in the first pass alone."""

    def __init__(self, past: Past, query: Tokens, key: Tokens, rule: Visibility, spread: Spread | None):
        super().__init__(query, key, rule)
        self._past, self._spread, self._calls = past, spread, 0

    def joined(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        call, self._calls = self._calls, self._calls + 1
        if self._spread is not None:
            rows = [self._spread(x) for x in (k, v)]
            self._past.own.append((Growing(rows[0], rows[0].shape[1]), Growing(rows[1], rows[1].shape[1])))
            return k, v
        keys, values = self._past.own[call]
        return keys.append(k), values.append(v)

    def under(self, visibility: Visibility | None) -> Sight:
        sight = super().under(visibility)
        if not sight.visibility.causal:
            raise ValueError(
                f"{sight.visibility} is not causal: what was read would have to see what comes later, so it cannot be "
                "remembered; give the Transformer a causal rule, or compute without a memory"
            )
        return sight


class _ContextSights(Sights):
    """Tokens over a context that was there in the first pass; `spread` in that pass alone."""

    def __init__(self, past: Past, query: Tokens, key: Tokens, spread: Spread | None):
        super().__init__(query, key)
        self._past, self._spread, self._calls = past, spread, 0
        self.known = spread is None

    def given(self, make: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        call, self._calls = self._calls, self._calls + 1
        if self._spread is None:
            return self._past.crossed[call]
        k, v = make()
        self._past.crossed.append((self._spread(k), self._spread(v)))
        return k, v


def by_token(part: nn.Module) -> bool:
    """Whether a part maps each token by itself, as it says with an attribute `by_token`: a memory may pass it by."""
    inside = isinstance(part, nn.Sequential) and all(map(by_token, part))
    return inside or isinstance(part, nn.Identity) or getattr(part, "by_token", False) is True


def _check_unseen(past: Tokens, tokens: Tokens, rule: Visibility) -> None:
    """Stop if what was read could see what comes now, which it did not."""
    seen = rule.allows(
        past.modality[:, :, None], past.position[:, :, None], tokens.modality[:, None], tokens.position[:, None]
    )
    same = (past.segment[:, :, None] == tokens.segment[:, None]) & past.valid[:, :, None]
    if bool((seen & same).any()):
        raise ValueError(
            f"under {rule} what was read sees what comes later, as its time is not before it: "
            "let time run through the stream (fusion.sequential: true)"
        )


def _padded(tokens: Tokens, one_segment: bool = False) -> tuple[Tokens, Spread]:
    """Tokens with a row for each sample, without channels, and how their values get there.

    Their segments are numbered within the sample; with `one_segment` they are one.
    """
    if tokens.layout is None:
        segment, spread = tokens.segment, _same
    else:
        cells, numbers = _cells(tokens.layout)
        index, segment = (torch.from_numpy(a).to(tokens.x.device, non_blocking=True) for a in (cells, numbers))
        spread = partial(_taken, index=index)
    empty = torch.empty(*segment.shape, 0, device=segment.device)
    segment = segment.clamp(max=0) if one_segment else segment
    return Tokens(x=empty, modality=spread(tokens.modality), position=spread(tokens.position), segment=segment), spread


def _same(values: Shaped[Tensor, "B T ..."]) -> Shaped[Tensor, "B T ..."]:
    return values


def _taken(values: Shaped[Tensor, "1 T ..."], index: Int[Tensor, "B W"]) -> Shaped[Tensor, "B W ..."]:
    return values[0].index_select(0, index.flatten()).unflatten(0, index.shape)


def _cells(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """For each cell of a padded batch its token in the packed row, and which segment of its sample that is of.

    Padding takes the first token of the row, and is of the segment PADDING.
    """
    by = layout.order(np.arange(layout.num_samples))
    sample, length = (np.asarray(values, dtype=np.int64)[by] for values in (layout.samples, layout.lengths))
    size = np.bincount(sample, weights=length, minlength=layout.num_samples).astype(np.int64)
    order = np.arange(size.sum())  # of the tokens, by sample
    row = np.repeat(sample, length)
    column = order - (size.cumsum() - size)[row]
    cells = np.zeros((layout.num_samples, size.max(initial=0)), dtype=np.int64)
    cells[row, column] = order + np.repeat(layout.offsets[:-1][by] - (length.cumsum() - length), length)
    numbers = np.full_like(cells, PADDING)
    numbers[row, column] = np.repeat(np.arange(len(by)) - np.searchsorted(sample, sample), length)
    return cells, numbers
