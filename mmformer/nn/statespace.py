"""State-space mixers: a state that runs along the sequence."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.nn.chunks import Chunks, carried, check_order, chunked, is_causal, planned, shifted
from mmformer.tokens import Tokens
from mmformer.visibility import Sights

INSTEAD = "a state runs along the whole sequence; take mmformer.nn.Attention with this rule"


class Mamba2(nn.Module):
    """The mixer of Mamba-2 (arXiv 2405.21060): a state of `state` channels for each head decays and is added to.

    It computes chunks of `chunk` tokens at once (section 6 of the paper), and starts anew with each segment. A token is
    told of those that stand before it, whatever the rule; `reverse` reads segments from their end, which a causal rule
    forbids. Where all are to see all, `BothWays` has one for each direction. The inner width is `expand` x dim, cut
    into heads of `head_dim`; `groups` of heads share their maps into and out of the state; `width` tokens are mixed by
    a convolution first. Parameters are named as in transformers' class.

    Raises:
        ValueError: widths that do not divide; a chunk shorter than the convolution; a rule other than causal; causal
            where time goes back; a memory.
    """

    def __init__(
        self,
        dim: int,
        state: int,
        *,
        head_dim: int = 64,
        expand: float = 2.0,
        groups: int = 1,
        width: int = 4,
        chunk: int = 64,
        reverse: bool = False,
    ):
        super().__init__()
        inner = round(expand * dim)
        if inner % head_dim or (inner // head_dim) % groups:
            raise ValueError(f"{inner} channels, heads of {head_dim}, {groups} groups: each must divide what is before")
        if chunk < width:
            raise ValueError(f"chunks of {chunk} tokens with a convolution over {width}: make them at least as long")
        self.heads, self.groups, self.state, self.width = inner // head_dim, groups, state, width
        self.chunk, self.reverse = chunk, reverse
        mixed = inner + 2 * groups * state
        self.in_proj = nn.Linear(dim, inner + mixed + self.heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, width, groups=mixed)
        step = torch.empty(self.heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.arange(1.0, self.heads + 1).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedNorm(inner, groups)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights) -> Float[Tensor, "B T D"]:
        if is_causal(sights, "a state-space mixer", INSTEAD):
            if self.reverse:
                raise ValueError("a state-space mixer that reads backwards sees what is later: leave out reverse")
            check_order(sights, "a state-space mixer")
        chunks = planned(sights, chunked, self.chunk, self.reverse)
        inner, mixed = self.norm.weight.shape[0], self.conv1d.in_channels
        gate, x, dt = chunks.cut(self.in_proj(tokens.x)).split([inner, mixed, self.heads], -1)
        x = F.silu(self._convolved(x, chunks))
        x, b, c = x.split([inner, self.groups * self.state, self.groups * self.state], -1)
        x, b, c, dt = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (x, b, c, dt))
        x, b, c = x.unflatten(-1, (self.heads, -1)), self._by_head(b), self._by_head(c)
        dt = F.softplus(dt + self.dt_bias)
        y = scan(x * dt[..., None], -torch.exp(self.A_log.to(x.dtype)) * dt, b, c, chunks) + self.D[:, None] * x
        return self.out_proj(chunks.join(self.norm(y.flatten(2), gate)).to(tokens.x.dtype))

    def _convolved(self, x: Float[Tensor, "n c m"], chunks: Chunks) -> Float[Tensor, "n c m"]:
        """Each token with those before it; what is before a chunk is the end of the one before it."""
        before = shifted(x[:, -(self.width - 1) :], chunks, 1) if self.width > 1 else x[:, :0]
        before = F.pad(before, (0, 0, self.width - 1 - before.shape[1], 0))
        return self.conv1d(torch.cat([before, x], 1).transpose(1, 2)).transpose(1, 2)

    def _by_head(self, x: Float[Tensor, "n c gs"]) -> Float[Tensor, "n c h s"]:
        return x.unflatten(-1, (self.groups, -1)).repeat_interleave(self.heads // self.groups, 2)


def scan(
    x: Float[Tensor, "n c h p"],
    decay: Float[Tensor, "n c h"],
    b: Float[Tensor, "n c h s"],
    c: Float[Tensor, "n c h s"],
    chunks: Chunks,
) -> Float[Tensor, "n c h p"]:
    """y[t] = c[t] h[t] with h[t] = exp(decay[t]) h[t - 1] + b[t] x[t], chunk by chunk (listing 1 of the paper)."""
    decay = decay.transpose(1, 2)
    upto = decay.cumsum(-1)
    weights = torch.einsum("nlhs,nkhs->nhlk", c, b) * torch.exp(_sums(decay))
    inside = torch.einsum("nhlk,nkhp->nlhp", weights, x)
    left = torch.exp(upto[..., -1:] - upto).transpose(1, 2)
    states = torch.einsum("nchs,nchp->nhps", b * left[..., None], x)
    before = carried(states, chunks, torch.exp(upto[..., -1])[..., None, None])
    return inside + torch.einsum("nchs,nhps->nchp", c, before) * torch.exp(upto).transpose(1, 2)[..., None]


def _sums(x: Float[Tensor, "n h c"]) -> Float[Tensor, "n h c c"]:
    """The sum over k + 1 ... l in cell (l, k), -inf above the diagonal; no differences of large sums."""
    size = x.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(-1)
    sums = torch.where(below, x[..., None], 0).cumsum(-2)
    return sums.masked_fill(below.T, -torch.inf)


class GatedNorm(nn.Module):
    """RMSNorm in `groups` of channels, of what a gate lets through."""

    def __init__(self, dim: int, groups: int, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*B D"], gate: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        grouped = (x * F.silu(gate.to(x.dtype))).unflatten(-1, (self.groups, -1))
        normed = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.flatten(-2)


class BothWays(nn.Module):
    """A mixer that reads segments from their start and one that reads them from their end, added up.

    `part` is a factory that takes `reverse`, as `Mamba2` does.
    """

    def __init__(self, dim: int, part: Callable[..., nn.Module]):
        super().__init__()
        self.ahead, self.back = part(dim), part(dim, reverse=True)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights) -> Float[Tensor, "B T D"]:
        return self.ahead(tokens, context, sights) + self.back(tokens, context, sights)
