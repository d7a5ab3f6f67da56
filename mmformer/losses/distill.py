"""Losses against what a teacher says: soft targets, alone or mixed with hard ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def soft_cross_entropy(logits: Float[Tensor, "n C"], targets: Float[Tensor, "n C"]) -> Float[Tensor, ""]:
    """The cross-entropy of distributions over the classes, summed over rows."""
    return -(logits.float().log_softmax(1) * targets).sum()


def distilled_contrastive(
    similarity: Float[Tensor, "n M"],
    taught: Float[Tensor, "n M"],
    positive: Bool[Tensor, "n M"],
    weight: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Picking the positives of each row among all keys, summed over rows (ALBEF, arXiv 2107.07651, eq. 6).

    The target is `weight` times what the teacher's similarities `taught` say, and for the rest shared evenly among
    the positives. Both similarities are divided by the temperature; the teacher gets no gradient.
    """
    hard = positive / positive.sum(1, keepdim=True)
    return soft_cross_entropy(similarity, weight * taught.detach().float().softmax(1) + (1 - weight) * hard)


def distilled_tokens(
    logits: Float[Tensor, "n V"],
    ids: Int[Tensor, " n"],
    taught: Float[Tensor, "n V"],
    weight: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """The cross-entropy of masked tokens, mixed with that of the words a teacher would put there, summed (eq. 7)."""
    logits = logits.float()  # once, so that the gradients of both parts are added in this precision
    hard = F.cross_entropy(logits, ids, reduction="sum")
    soft = soft_cross_entropy(logits, taught.detach().float().softmax(1))
    return torch.lerp(hard, soft, torch.as_tensor(weight, dtype=hard.dtype, device=hard.device))
