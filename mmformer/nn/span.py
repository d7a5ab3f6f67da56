"""Attention whose heads learn how far they look."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmformer.nn.chunks import Chunks, chunked, planned, refuse_memory, smallest_step
from mmformer.tokens import Tokens
from mmformer.visibility import Sight, Sights, Visibility


class AdaptiveSpan(nn.Module):
    """Attention whose heads each learn how far they look (adaptive span, arXiv 1905.07799).

    A head of span `z` in [0, 1] weighs a key `d` tokens away by clamp((ramp + z max_span - d) / ramp, 0, 1), after the
    softmax, which is then normalised again; keys `max_span` or more away are not seen. Distance counts tokens of the
    segment, in both directions. It works under any rule, which then has to allow a key too.

    Heads are computed in groups of like reach, rounded up to `block` tokens: T x 3 reach scores for each (2 where time
    alone orders the keys), so that what is computed follows the learned spans. They are asked of the device once a
    call. The penalty that keeps spans short is `mmformer.objectives.SpanPenalty`.

    Raises:
        ValueError: channels that do not divide by the heads; a memory.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        max_span: int,
        *,
        ramp: int = 32,
        initial: float = 0.0,
        block: int = 64,
        rotary: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels do not divide by {num_heads} heads")
        self.heads, self.max_span, self.ramp, self.block = num_heads, max_span, ramp, block
        self.rotary = rotary(dim // num_heads) if rotary else None
        self.z = nn.Parameter(torch.full((num_heads,), float(initial)))
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights) -> Float[Tensor, "B T D"]:
        refuse_memory(sights, "adaptive span")
        q, k, v = self.qkv(tokens.x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.rotary is not None:
            q, k = self.rotary(q, k, tokens.position)
        ahead = not sights.visibility.causal or planned(sights, smallest_step) < 1
        span = self.span()
        parts, order = [], []
        for size, heads in self.reaches().items():
            near = planned(sights, _near, sights.visibility, size, ahead)
            where = torch.tensor(heads, device=q.device)
            q_own, k_own, v_own = (near.chunks.cut(x.index_select(2, where)) for x in (q, k, v))
            weight = self._weight(span.index_select(0, where), near.chunks.size, near.steps)
            parts.append(near.chunks.join(_attend(q_own, k_own, v_own, near, weight)))
            order += heads
        gathered = torch.cat(parts, 2).index_select(2, torch.tensor(order, device=q.device).argsort())
        return self.out(gathered.flatten(2))

    def span(self) -> Float[Tensor, " H"]:
        """How far each head looks with full weight, in tokens.

        A parameter that a step has taken out of [0, 1] counts as its bound, and still has a gradient.
        """
        return self.max_span * (self.z + (self.z.clamp(0, 1) - self.z).detach())

    def clamp(self) -> None:
        """Take the parameter back into [0, 1], after a step of the optimizer."""
        with torch.no_grad():
            self.z.clamp_(0, 1)

    def reaches(self) -> Mapping[int, list[int]]:
        """The heads by how many tokens away they look at all, rounded up to whole blocks."""
        groups = defaultdict(list)
        for head, span in enumerate(self.span().tolist()):
            reach = min(math.floor(span + self.ramp), self.max_span - 1)
            groups[self.block * max(1, math.ceil(reach / self.block))].append(head)
        return groups

    def _weight(self, span: Float[Tensor, " h"], size: int, steps: Sequence[int]) -> Float[Tensor, "h c k"]:
        """What the span says of each query and key of a chunk and those beside it; below zero: out of sight."""
        place = torch.arange(size, device=span.device)
        key = torch.cat([place + step * size for step in steps])
        distance = (key - place[:, None]).abs()
        weight = (self.ramp + span[:, None, None] - distance) / self.ramp
        return torch.where(distance < self.max_span, weight, -1.0)


@dataclass(frozen=True, eq=False)
class _Near:
    """Chunks, which of those beside its own a query of each looks at, and which of their keys the rule allows."""

    chunks: Chunks
    steps: Sequence[int]
    seen: Bool[Tensor, "n 1 _ k"]


def _near(tokens: Tokens, rule: Visibility, size: int, ahead: bool) -> _Near:
    chunks = chunked(tokens, size)
    alone = chunks.counts.max(initial=0) <= 1
    steps = (0,) if alone else (-1, 0, 1) if ahead else (-1, 0)
    chunk, exists = chunks.beside(steps)
    real = (chunks.real[chunk] & exists[..., None]).flatten(1)
    if rule.full:
        return _Near(chunks, steps, real[:, None, None])
    modality, position = chunks.cut(tokens.modality), chunks.cut(tokens.position)
    theirs = modality[chunk].flatten(1), position[chunk].flatten(1, 2)
    last = Sight(rule, tokens, tokens).last
    last = None if last is None else chunks.cut(last)[:, :, None]
    allowed = rule.allows(modality[:, :, None], position[:, :, None], theirs[0][:, None], theirs[1][:, None], last)
    return _Near(chunks, steps, (allowed & real[:, None])[:, None])


def _attend(
    q: Float[Tensor, "n c h d"],
    k: Float[Tensor, "n c h d"],
    v: Float[Tensor, "n c h d"],
    near: _Near,
    weight: Float[Tensor, "h c k"],
) -> Float[Tensor, "n c h d"]:
    """Softmax over what is seen, weighed by the span and normalised again."""
    if len(near.steps) > 1:
        chunk, _ = near.chunks.beside(near.steps)
        k, v = k[chunk].flatten(1, 2), v[chunk].flatten(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    seen = near.seen & (weight >= 0)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    shares = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    shares = torch.where(seen, shares * weight.clamp(0, 1), 0)
    shares = shares / (shares.sum(-1, keepdim=True) + 1e-8)
    return (shares.to(v.dtype) @ v).transpose(1, 2)
