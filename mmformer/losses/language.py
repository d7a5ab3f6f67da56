"""Losses of language modelling: the next token, and which tokens a prompt leaves to train."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def token_loss(logits: Float[Tensor, "n V"], ids: Int[Tensor, " n"], smoothing: float = 0.0) -> Float[Tensor, ""]:
    """The cross-entropy of each token in its logits, summed; `smoothing` spreads that share over all words.

    BLIP and LAVIS smooth by 0.1 (arXiv 2201.12086).
    """
    return F.cross_entropy(logits.float(), ids, label_smoothing=smoothing, reduction="sum")


def next_token_loss(
    logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"], trained: Bool[Tensor, "B T"], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """The mean cross-entropy of the trained tokens, each in the logits of the place before it; 0 without any.

    The first place of a row has none before it and is never trained.
    """
    chosen = trained[:, 1:]
    total = token_loss(logits[:, :-1][chosen], ids[:, 1:][chosen], smoothing)
    return total / chosen.sum().clamp(min=1)


def answer_mask(ids: Int[Tensor, " n"], first: Int[Tensor, " n"], start: int, end: int | None) -> Bool[Tensor, " n"]:
    """Which ids stand behind a `start`, up to and including the next `end`, or the end of their text.

    Several texts lie end to end: `first[i]` is the index at which the text of id i begins.

    Raises:
        ValueError: `start` and `end` are the same id.
    """
    if start == end:
        raise ValueError(f"start and end are both id {start}: what stands between two of them is told by neither")
    index = torch.arange(len(ids), device=ids.device)
    opened = _before(torch.where(ids == start, index, -1))
    closed = first - 1 if end is None else _before(torch.where(ids == end, index, -1))
    return (opened >= first) & (opened > closed)


def _before(marks: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The largest of the marks in front of each place; -1 in front of the first."""
    return torch.cat([marks.new_full((1,), -1), marks])[:-1].cummax(0).values
