"""Connectionist temporal classification: a short text from a long sequence, wherever in it each letter is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def ctc_losses(
    logits: Float[Tensor, "B T V"], lengths: Sequence[int], ids: Int[Tensor, " n"], counts: Sequence[int], blank: int
) -> Float[Tensor, " B"]:
    """The negative log-likelihood of each text over all its alignments, divided by its length (Graves et al., 2006).

    `lengths` are those of the sequences, `counts` of the texts, which lie end to end in `ids`. A text that its sequence
    is too short for has no alignment, and a loss of 0.
    """
    scores = logits.float().log_softmax(-1).transpose(0, 1)
    sizes, letters = torch.tensor(lengths), torch.tensor(counts)
    losses = F.ctc_loss(scores, ids, sizes, letters, blank, reduction="none", zero_infinity=True)
    return losses / letters.to(losses.device).clamp(min=1)


def greedy(logits: Float[Tensor, "T V"], blank: int) -> list[int]:
    """The likeliest id of each place, runs of one taken as one, without the blanks."""
    ids = logits.argmax(-1).unique_consecutive().tolist()
    return [i for i in ids if i != blank]
