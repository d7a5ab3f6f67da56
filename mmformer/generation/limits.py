"""What may come next: functions on the scores of a vocabulary, and the rules that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Scores = Float[Tensor, "B V"]
History = Int[Tensor, "B T"]
"""Ids so far, oldest first; -1 is none."""


def penalise(scores: Scores, history: History, penalty: float) -> Scores:
    """The scores of ids that occurred divided by `penalty`, negative ones times it (CTRL, arXiv 1909.05858)."""
    found = scores.gather(1, history.clamp(min=0))
    found = torch.where(found < 0, found * penalty, found / penalty)
    padded = torch.cat([scores, scores.new_zeros(len(scores), 1)], 1)  # a place for those that are none
    return padded.scatter(1, torch.where(history < 0, scores.shape[1], history), found)[:, :-1]


def forbid_repeats(scores: Scores, history: History, size: int) -> Scores:
    """Minus infinity for ids that would repeat a run of `size` ids (arXiv 1705.04304)."""
    if history.shape[1] < size:
        return scores
    runs = history.unfold(1, size, 1)
    tail = history[:, history.shape[1] - size + 1 :]
    hit = (runs[..., :-1] == tail[:, None]).all(-1) & (runs >= 0).all(-1)
    return _without(scores, torch.where(hit, runs[..., -1], -1))


def forbid(scores: Scores, ids: Sequence[int]) -> Scores:
    """Minus infinity for some ids."""
    return scores.index_fill(1, torch.tensor(list(ids), dtype=torch.long, device=scores.device), -torch.inf)


def keep_top(scores: Scores, count: int) -> Scores:
    """Minus infinity for all but the `count` highest; as many more stay as equal the last of them."""
    least = scores.topk(min(count, scores.shape[1])).values[:, -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def keep_nucleus(scores: Scores, share: float) -> Scores:
    """Minus infinity for all but the fewest ids whose probabilities sum to `share` (arXiv 1904.09751)."""
    ordered, ids = scores.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return scores.masked_fill((before >= share).scatter(1, ids, before >= share), -torch.inf)


def _without(scores: Scores, ids: History) -> Scores:
    """Minus infinity for the ids of each row; -1 is none."""
    padded = torch.cat([scores, scores.new_zeros(len(scores), 1)], 1)
    return padded.scatter(1, torch.where(ids < 0, scores.shape[1], ids), -torch.inf)[:, :-1]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a text gets, what ends it, and what it may not hold.

    At most `max_length` tokens are written and at least `min_length`, up to the first of the ids `stop`, which is
    counted. `repetition_penalty` is that of `penalise`, `no_repeat` the length of runs that do not occur twice, prompt
    and text taken together; `banned` ids never come.

    Raises:
        ValueError: lengths that leave nothing, or a penalty that is not positive.
    """

    max_length: int
    min_length: int = 0
    stop: Sequence[int] = ()
    banned: Sequence[int] = ()
    repetition_penalty: float = 1.0
    no_repeat: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "banned", tuple(self.banned))
        if self.max_length < 1 or self.min_length > self.max_length:
            raise ValueError(f"a text of {self.min_length} to {self.max_length} tokens: give room for at least one")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty {self.repetition_penalty}: give a factor above 0; 1 changes nothing")

    def __call__(self, scores: Scores, history: History, length: int) -> Scores:
        """The scores of what may come next in texts of `length` tokens behind their prompts."""
        if self.repetition_penalty != 1:
            scores = penalise(scores, history, self.repetition_penalty)
        if self.no_repeat:
            scores = forbid_repeats(scores, history, self.no_repeat)
        if self.banned:
            scores = forbid(scores, self.banned)
        return forbid(scores, self.stop) if self.stop and length < self.min_length else scores

    def ends(self, ids: Int[Tensor, "*B"]) -> Tensor:
        """Which of these ids end a text."""
        return torch.isin(ids, torch.tensor(list(self.stop), dtype=ids.dtype, device=ids.device))
