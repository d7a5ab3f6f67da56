"""Losses against what a teacher says: soft targets, alone or mixed with hard ones, states, relations and attention.

All are sums, over rows unless the docstring says otherwise, so that means can be taken over the rows of all processes.
What the teacher says gets no gradient.
"""

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


def softened(logits: Float[Tensor, "n C"], taught: Float[Tensor, "n C"], temperature: float = 1.0) -> Float[Tensor, ""]:
    """KL divergence from the teacher's distribution, both softened, times the squared temperature (arXiv 1503.02531).

    The factor keeps the size of the gradient, so that the weight of the loss need not change with the temperature.
    """
    wanted = (taught.detach().float() / temperature).log_softmax(1)
    said = (logits.float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(said, wanted, reduction="sum", log_target=True)


def softened_labels(
    logits: Float[Tensor, "n C"], taught: Float[Tensor, "n C"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """As `softened`, for classes of which each holds or not by itself; summed over rows and classes."""
    wanted, said = taught.detach().float() / temperature, logits.float() / temperature
    pairs = ((F.logsigmoid(sign * wanted), F.logsigmoid(sign * said)) for sign in (1, -1))
    return temperature**2 * torch.stack([(t.exp() * (t - s)).sum() for t, s in pairs]).sum()


def distances(x: Float[Tensor, "n D"], taught: Float[Tensor, "n E"]) -> Float[Tensor, ""]:
    """The mean over pairs of the Huber loss of their distances, each side's as shares of its mean one (RKD-D).

    Relational knowledge distillation, arXiv 1904.05068, equations 4 to 6: the two spaces may have different widths.
    """
    return F.smooth_l1_loss(_apart(x.float()), _apart(taught.detach().float()))


def angles(x: Float[Tensor, "n D"], taught: Float[Tensor, "n E"]) -> Float[Tensor, ""]:
    """The mean over triples of the Huber loss of the cosine at their middle (RKD-A, arXiv 1904.05068, equation 7).

    Works on n^3 numbers.
    """
    return F.smooth_l1_loss(_cosines(x.float()), _cosines(taught.detach().float()))


def affinity(
    similarity: Float[Tensor, "n M"], taught: Float[Tensor, "n M"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """KL divergence from how a teacher's similarities share each row out among the keys.

    Affinity mimicking of TinyCLIP (arXiv 2309.12314, equation 1), CRD of CLIP-KD (arXiv 2307.12732, equation 5). Both
    are multiplied by their scales already.
    """
    return softened(similarity, taught, temperature)


def attention_transfer(
    x: Float[Tensor, "n T D"], taught: Float[Tensor, "n T E"], valid: Bool[Tensor, "n T"]
) -> Float[Tensor, ""]:
    """The squared distance of where the energy of two token sequences lies, each map brought to length 1.

    Activation-based attention transfer, arXiv 1612.03928, equation 2, with p = 2: the widths may differ. `valid` says
    which tokens count.
    """
    maps = [F.normalize((s.float().square().sum(-1) * valid), dim=-1) for s in (x, taught.detach())]
    return (maps[0] - maps[1]).square().sum()


def relations(
    pair: tuple[Float[Tensor, "n T D"], Float[Tensor, "n T D"]],
    taught: tuple[Float[Tensor, "n T E"], Float[Tensor, "n T E"]],
    valid: Bool[Tensor, "n T"],
    heads: int,
) -> Float[Tensor, ""]:
    """KL divergence of scaled dot-product attention from `pair[0]` to `pair[1]`, the mean over heads, summed over rows.

    MiniLM v2, arXiv 2012.15828, equations 5 to 8: queries and keys give the attention itself, values with values their
    relation. Both widths are cut anew into `heads`, so that the two models may have different numbers of them.
    """
    said, wanted = (_attention(a, b, valid, heads) for a, b in (pair, (taught[0].detach(), taught[1].detach())))
    seen = valid[:, None, :, None] & valid[:, None, None, :]
    return torch.where(seen, wanted.exp() * (wanted - said), 0).sum() / heads


def _apart(x: Float[Tensor, "n D"]) -> Float[Tensor, " pairs"]:
    found = F.pdist(x)
    return found / found.mean().clamp(min=1e-12)


def _cosines(x: Float[Tensor, "n D"]) -> Float[Tensor, "n n n"]:
    sides = F.normalize(x[None] - x[:, None], dim=-1)
    return sides @ sides.transpose(1, 2)


def _attention(
    a: Float[Tensor, "n T D"], b: Float[Tensor, "n T D"], valid: Bool[Tensor, "n T"], heads: int
) -> Float[Tensor, "n heads T T"]:
    """Logarithms of attention weights."""
    a, b = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (a, b))
    scores = a @ b.transpose(-1, -2) * a.shape[-1] ** -0.5
    return scores.masked_fill(~valid[:, None, None], torch.finfo(scores.dtype).min).log_softmax(-1)
