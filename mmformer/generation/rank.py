"""Which of several texts a model would write: by their log-likelihood behind what a sample has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmformer.generation.draft import Draft

AT_ONCE = 64
"""Candidates that are judged in one pass, each with a copy of what its sample's memory holds."""


@torch.inference_mode()
def rank(
    draft: Draft, candidates: Sequence[Sequence[int]], first: int | None = None, at_once: int = AT_ONCE
) -> Float[Tensor, "B C"]:
    """The log-likelihood of each candidate behind each sample, in nats; the context was computed once for all.

    Candidates are ids, the end token with them where texts have one. With `first`, only so many for each sample as have
    the likeliest first token are judged, and the others are minus infinity (ALBEF's and BLIP's answers).

    Raises:
        ValueError: no candidate, or an empty one.
    """
    if not candidates or not all(candidates):
        raise ValueError(f"{len(candidates)} candidates, of {[len(ids) for ids in candidates]} ids: each needs one")
    device = draft.scores.device
    starts = torch.tensor([ids[0] for ids in candidates], device=device)
    start = draft.scores.log_softmax(-1)[:, starts]
    judged = start.topk(min(first or len(candidates), len(candidates))).indices.tolist()
    pairs = [(row, i) for row, chosen in enumerate(judged) for i in chosen]
    out = torch.full_like(start, -torch.inf)
    pairs.sort(key=lambda pair: len(candidates[pair[1]]))
    for i in range(0, len(pairs), at_once):
        rows, columns = (list(side) for side in zip(*pairs[i : i + at_once], strict=True))
        out[rows, columns] = start[rows, columns] + _rest(draft, rows, [candidates[c] for c in columns])
    return out


def _rest(draft: Draft, rows: list[int], texts: list[Sequence[int]]) -> Float[Tensor, " n"]:
    """The log-likelihood of all tokens of the texts but the first."""
    width = max(map(len, texts))
    if width == 1:
        return torch.zeros(len(rows), device=draft.scores.device)
    ids = torch.tensor([[*text, *[-1] * (width - len(text))] for text in texts], device=draft.scores.device)
    following = ids[:, 1:]
    logits = draft.select(rows).follow(torch.where(following < 0, -1, ids[:, :-1]))
    found = logits.log_softmax(-1).gather(2, following.clamp(min=0)[..., None])[..., 0]
    return torch.where(following < 0, 0, found).sum(1)
