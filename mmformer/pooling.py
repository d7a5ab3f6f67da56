"""Token sequences to one vector a sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmformer.tokens import Tokens, is_one_of


def mean_by_sample(
    tokens: Tokens, modalities: Sequence[str] | None = None
) -> tuple[Float[Tensor, "N D"], Bool[Tensor, " N"]]:
    """The mean of each sample's tokens, of the named modalities or all, and which samples have any; zeros elsewhere."""
    chosen = tokens.valid
    if modalities is not None:
        chosen = chosen & is_one_of(tokens, modalities)
    weight = chosen.to(tokens.x.dtype)
    if tokens.layout is None:
        total = (tokens.x * weight[..., None]).sum(1)
        count = weight.sum(1)
    else:
        sample = tokens.sample()[0].clamp(min=0)
        total = tokens.x.new_zeros(tokens.num_samples, tokens.x.shape[-1])
        total = total.index_add(0, sample, tokens.x[0] * weight[0][:, None])
        count = tokens.x.new_zeros(tokens.num_samples).index_add(0, sample, weight[0])
    return total / count.clamp(min=1)[:, None], count > 0


class MeanPool(nn.Module):
    """The mean over a sample's tokens of the named modalities (all where none is named)."""

    def __init__(self, modalities: Sequence[str] | None = None):
        super().__init__()
        self.modalities = modalities

    def forward(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        return mean_by_sample(tokens, self.modalities)[0]


def has_tokens(tokens: Tokens) -> Bool[Tensor, " N"]:
    """Which samples have any token."""
    if tokens.layout is None:
        return tokens.valid.any(1)
    found = torch.zeros(tokens.num_samples, dtype=torch.bool)
    found[list(tokens.layout.samples)] = True
    return found.to(tokens.x.device, non_blocking=True)


class FirstPool(nn.Module):
    """The mean of a sample's first `count` tokens: its class token, or AST's two; zeros without tokens.

    `joined` puts them side by side instead, count x D channels (DeiT's two). `start` tokens in front of them are passed
    over (the queries in front of BLIP-2's texts).
    """

    def __init__(self, count: int = 1, joined: bool = False, start: int = 0):
        super().__init__()
        self.places, self.joined = range(start, start + count), joined

    def forward(self, tokens: Tokens) -> Float[Tensor, "N E"]:
        found = [_at(tokens, place) for place in self.places]
        return torch.cat(found, -1) if self.joined else torch.stack(found).mean(0)


class LastPool(nn.Module):
    """A sample's last token: the end of a text that was read causally (CLIP, GPT); zeros without tokens."""

    def forward(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        return _at(tokens, -1)


def _at(tokens: Tokens, place: int) -> Float[Tensor, "N D"]:
    """The token at one place of each sample, counted from the end where it is negative."""
    if tokens.layout is None:  # padding may stand anywhere in a row, as behind a merge
        rank = tokens.valid.cumsum(1)
        here = rank == (place + 1 if place >= 0 else rank[:, -1:] + place + 1)
        return torch.where((here & tokens.valid)[..., None], tokens.x, 0).sum(1)
    out = tokens.x.new_zeros(tokens.num_samples, tokens.x.shape[-1])
    layout = tokens.layout
    starts, lengths = layout.offsets[:-1], np.asarray(layout.lengths, dtype=np.int64)
    whole = lengths > (place if place >= 0 else -place - 1)
    # A sample with several segments: the first one's start or the last one's end, the other being overwritten.
    order = np.flatnonzero(whole)[:: -1 if place >= 0 else 1]
    chosen = {layout.samples[i]: int(starts[i] + (place if place >= 0 else lengths[i] + place)) for i in order}
    samples, index = torch.tensor(list(chosen)), torch.tensor(list(chosen.values()), dtype=torch.long)
    device = tokens.x.device
    return out.index_copy(0, samples.to(device), tokens.x[0].index_select(0, index.to(device))) if chosen else out


class EndPool(nn.Module):
    """Of each modality the first token (its class token) or the `last`: their mean over those that a sample has.

    `joined` puts them side by side instead, zeros where a sample lacks one: modalities x D channels (MulT).
    """

    def __init__(self, modalities: Sequence[str], last: bool = False, joined: bool = False):
        super().__init__()
        self.modalities, self.last, self.joined = list(modalities), last, joined

    def forward(self, tokens: Tokens) -> Float[Tensor, "N E"]:
        found, present = zip(*(_end(tokens, name, self.last) for name in self.modalities), strict=True)
        if self.joined:
            return torch.cat(found, -1)
        count = torch.stack(present).sum(0).clamp(min=1)
        return torch.stack(found).sum(0) / count[:, None]


def _end(tokens: Tokens, modality: str, last: bool) -> tuple[Float[Tensor, "N D"], Bool[Tensor, " N"]]:
    """Each sample's first or last token of a modality, zeros where it has none, and which samples have any."""
    chosen = (tokens.valid & is_one_of(tokens, [modality])).flatten()
    place = torch.arange(len(chosen), device=chosen.device) + 1
    rank = torch.where(chosen, place if last else len(chosen) + 1 - place, 0)
    best = rank.new_zeros(tokens.num_samples)
    best = best.scatter_reduce(0, tokens.sample().flatten().clamp(min=0), rank, "amax")
    index = (best - 1 if last else len(chosen) - best).clamp(0, len(chosen) - 1)
    row = tokens.x.flatten(0, 1).index_select(0, index)
    return torch.where((best > 0)[:, None], row, 0), best > 0


class _ByModality(nn.Module):
    """A mean for each modality, with a learned vector where a sample lacks it."""

    def __init__(self, dim: int, modalities: Sequence[str]):
        super().__init__()
        self.modalities = list(modalities)
        self.absent = nn.ParameterDict({name: torch.randn(dim) * 0.02 for name in self.modalities})

    def forward(self, tokens: Tokens) -> list[Float[Tensor, "N D"]]:
        means = []
        for name in self.modalities:
            mean, present = mean_by_sample(tokens, [name])
            means.append(torch.where(present[:, None], mean, self.absent[name].to(mean.dtype)))
        return means


class ConcatenationPool(nn.Module):
    """Late fusion: the modalities' means side by side, mapped back to `dim` channels by a two-layer perceptron."""

    def __init__(self, dim: int, modalities: Sequence[str]):
        super().__init__()
        self.means = _ByModality(dim, modalities)
        self.mix = nn.Sequential(nn.Linear(dim * len(modalities), 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        return self.mix(torch.cat(self.means(tokens), -1))


class LowRankPool(nn.Module):
    """Low-rank tensor fusion (arXiv 1806.00064, eq. 7): the outer product of the modalities' means, never formed."""

    def __init__(self, dim: int, modalities: Sequence[str], rank: int):
        super().__init__()
        self.means = _ByModality(dim, modalities)
        self.factors = nn.ModuleList(nn.Linear(dim, rank * dim) for _ in modalities)  # its bias is the appended 1
        self.weights = nn.Parameter(torch.full((rank,), rank**-0.5))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        product = None
        for factor, mean in zip(self.factors, self.means(tokens), strict=True):
            mapped = factor(mean).unflatten(-1, (len(self.weights), -1))
            product = mapped if product is None else product * mapped
        assert product is not None
        return torch.einsum("nrd,r->nd", product, self.weights) + self.bias
