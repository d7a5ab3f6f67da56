"""Image-text matching with hard negatives: which pairs are judged beside the true ones, and by what loss.

Four published codes weigh the negatives of a row by its similarities, each a function of `similarity` (that the
temperature has already divided) and `same` (which keys show the same thing as the row, the row's own among them):

    zeroed     softmax, then 0 where the same                  ALBEF (arXiv 2107.07651)
    floored    softmax + 1e-4, then 0 where the same           BLIP (arXiv 2201.12086)
    excluded   -inf where the same, then softmax               LAVIS' ALBEF
    masked     -10000 where the same, then softmax             BLIP-2 (arXiv 2301.12597)

But for the floor these are one distribution, as long as the own key does not leave the others a weight of 0, which the
first two allow. None ever gives a weight to a key that shows the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Weighting = Callable[[Tensor, Tensor], Tensor]


def similarity(a: Float[Tensor, "N A"], b: Float[Tensor, "M B"]) -> Float[Tensor, "N M"]:
    """The dot product of every row of one side with every row of the other, in single precision at least.

    Where rows of one side are wider they hold several vectors each, of which the best counts: BLIP-2's queries.

    Raises:
        ValueError: a width that is no multiple of the other.
    """
    width = min(a.shape[1], b.shape[1])
    if not width or a.shape[1] % width or b.shape[1] % width:
        raise ValueError(f"vectors of {a.shape[1]} and of {b.shape[1]} channels: one must be a multiple of the other")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        one, other = (rows.to(dtype).unflatten(1, (-1, width)) for rows in (a, b))
        return torch.einsum("nkd,mld->nmkl", one, other).amax((2, 3))


def zeroed(similarity: Float[Tensor, "N M"], same: Bool[Tensor, "N M"]) -> Float[Tensor, "N M"]:
    """ALBEF's weights."""
    return similarity.softmax(1).masked_fill(same, 0)


def floored(similarity: Float[Tensor, "N M"], same: Bool[Tensor, "N M"]) -> Float[Tensor, "N M"]:
    """BLIP's weights, whose floor keeps every negative possible."""
    return (similarity.softmax(1) + 1e-4).masked_fill(same, 0)


def excluded(similarity: Float[Tensor, "N M"], same: Bool[Tensor, "N M"]) -> Float[Tensor, "N M"]:
    """The weights of LAVIS' ALBEF; 0 in a row in which all keys show the same."""
    return similarity.masked_fill(same, -torch.inf).softmax(1).nan_to_num(0)


def masked(similarity: Float[Tensor, "N M"], same: Bool[Tensor, "N M"]) -> Float[Tensor, "N M"]:
    """BLIP-2's weights."""
    return similarity.masked_fill(same, -10000).softmax(1).masked_fill(same, 0)


def sample_negatives(weights: Float[Tensor, "N M"], noise: Float[Tensor, "N M"]) -> Int[Tensor, " N"]:
    """One key for each row, drawn in proportion to the weights; `noise` is uniform in (0, 1), a number for each pair.

    The key whose exponential clock of that rate rings first, so that what is drawn depends on no order of the keys.

    Raises:
        ValueError: a row without a key to draw: a batch of one, or one in which all show the same.
    """
    if lacking := int((weights.sum(1) <= 0).sum()):
        raise ValueError(
            f"{lacking} of {len(weights)} rows have no negative among {weights.shape[1]} candidates: a batch needs two"
            " samples at least that show different things (data.loader.batch_size); weights of `zeroed` may also have"
            " become 0, which `excluded` does not let happen"
        )
    return (weights.double() / -noise.double().log()).argmax(1)


def pair_noise(seed: int, rows: Int[Tensor, " N"], keys: Int[Tensor, " M"]) -> Float[Tensor, "N M"]:
    """Uniform numbers in (0, 1), each a function of the seed, a row's number and a key's, wherever the two stand.

    By the finalizer of splitmix64, so that the processes of a step need not agree on an order to draw alike.
    """
    mixed = _mix(_mix(rows + _mix(torch.tensor(_wrapped(seed))))[:, None] + keys)
    return (((mixed >> 11) & (2**53 - 1)).double() + 0.5) / 2**53


def _mix(x: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Steele, Lea and Flood's splitmix64; integers of torch wrap around."""
    x = x + _wrapped(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _wrapped(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, "*n"], places: int) -> Int[Tensor, "*n"]:
    return (x >> places) & (2 ** (64 - places) - 1)


def _wrapped(number: int) -> int:
    """A number as a signed integer of 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def matching_loss(logits: Float[Tensor, "n 2"], matches: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
    """The cross-entropy of telling pairs that match (class 1) from those that do not, summed."""
    return F.cross_entropy(logits.float(), matches.long(), reduction="sum")
