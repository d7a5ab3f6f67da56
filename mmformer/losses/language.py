"""Losses of language modelling: the next token, and which tokens a prompt leaves to train."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""The id of a token that is not to be predicted, as `F.cross_entropy` has it."""

# Of the scores, this many exist at a time; but fewer rows than that would spend their time on the weights' gradient.
_SCORES = 2**23
_ROWS = 256


def token_loss(logits: Float[Tensor, "n V"], ids: Int[Tensor, " n"], smoothing: float = 0.0) -> Float[Tensor, ""]:
    """The cross-entropy of each token in its logits, summed; `smoothing` spreads that share over all words.

    BLIP and LAVIS smooth by 0.1 (arXiv 2201.12086).
    """
    return F.cross_entropy(logits.float(), ids, label_smoothing=smoothing, reduction="sum")


def linear_token_loss(
    x: Float[Tensor, "n D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    ids: Int[Tensor, " n"],
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """`token_loss` of the scores that a linear map gives, without ever having all of them.

    The gradients are formed beside the loss, some rows at a time, where it is going to be differentiated (Liger Kernel,
    arXiv 2410.10989; Cut Your Losses, arXiv 2411.09009). It can be differentiated once. Products are in the precision
    of autocast or of `x`, all else in 32 bits. Rows whose id is -100 count nothing.
    """
    return _LinearTokenLoss.apply(x, weight, bias, ids, smoothing, torch.is_grad_enabled())  # pyright: ignore


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, smoothing: float, trained: bool
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            parts = _Parts(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), ids, smoothing)
            need_x, need_weight, need_bias = (trained and needed for needed in ctx.needs_input_grad[:3])
            dx = torch.empty_like(parts.x) if need_x else None
            dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
            dbias = torch.zeros_like(bias, dtype=wide) if need_bias and bias is not None else None
            total = parts.run(dx, dweight, dbias)
        made = dx, dweight, dbias
        ctx.save_for_backward(*(part for part in made if part is not None))
        given = x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype
        ctx.like = [None if part is None else own for part, own in zip(made, given, strict=True)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        made = iter(ctx.saved_tensors)
        # in place: a copy would be as large as the weights, and a second backward pass is then refused by autograd
        gradients = (None if dtype is None else next(made).mul_(upstream).to(dtype) for dtype in ctx.like)
        return *gradients, None, None, None


class _Parts:
    """The scores of some rows at a time, and what they leave behind."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, smoothing: float):
        self.x, self.weight, self.bias, self.ids, self.smoothing = x, weight, bias, ids, smoothing

    def run(self, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> Tensor:
        """The loss; gradients are written to what is given for them."""
        rows = max(_ROWS, _SCORES // len(self.weight))
        total = torch.zeros((), dtype=torch.promote_types(self.x.dtype, torch.float32), device=self.x.device)
        for start in range(0, len(self.x), rows):
            part = slice(start, start + rows)
            loss, slope = self._rows(part)
            total += loss
            if dbias is not None:
                dbias += slope.sum(0)
            slope = slope.to(self.x.dtype)
            if dx is not None:
                torch.mm(slope, self.weight, out=dx[part])
            if dweight is not None and dweight.dtype == slope.dtype:
                dweight.addmm_(slope.T, self.x[part])
            elif dweight is not None:
                dweight += slope.T @ self.x[part]
        return total

    def _rows(self, part: slice) -> tuple[Tensor, Tensor]:
        """The loss of some rows, and the gradient of their scores."""
        scores = F.linear(self.x[part], self.weight, self.bias)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        counts = self.ids[part] != IGNORED
        ids = self.ids[part].clamp(min=0)[:, None]
        hit = 1 - self.smoothing
        top, where = scores.max(-1, keepdim=True)
        slope = torch.softmax(scores, -1)
        # log sum exp by the largest share, which is at least 1 / V; a softmax is a third of the passes of a logsumexp
        losses = top - slope.gather(1, where).log() - hit * scores.gather(1, ids)
        if self.smoothing:
            losses = losses - self.smoothing * scores.mean(-1, keepdim=True)
        loss = losses[:, 0].where(counts, 0).sum()
        if self.smoothing:
            slope.sub_(self.smoothing / len(self.weight))
        slope.scatter_add_(1, ids, slope.new_full(ids.shape, -hit))
        if slope.device.type != "cpu" or not counts.all():  # a device is not asked
            slope.mul_(counts[:, None])
        return loss, slope


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
