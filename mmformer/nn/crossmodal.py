"""Each modality as each other one would tell it: cross-attention stacks for every ordered pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmformer.nn.experts import apply
from mmformer.nn.sequences import in_order, nothing
from mmformer.tokens import Tokens, merge
from mmformer.visibility import Sights, Visibility


class JointNorm(nn.Module):
    """Cross-attention with one norm for its queries and its context, which takes the place of the block's own."""

    def __init__(self, dim: int, part: Callable[[int], nn.Module], norm: Callable[[int], nn.Module] = nn.LayerNorm):
        super().__init__()
        self.norm = norm(dim)
        self.part = part(dim)

    def forward(self, tokens: Tokens, context: Tokens, sights: Sights) -> Float[Tensor, "B T D"]:
        normed = context if sights.known else context.with_x(apply(self.norm, context))
        return self.part(tokens.with_x(apply(self.norm, tokens)), normed, sights)


class Residual(nn.Module):
    """What a part makes of a vector, and the vector itself on top."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return x + self.part(x)


class Crossmodal(nn.Module):
    """The multimodal Transformer for unaligned sequences (MulT, ACL 2019, arXiv 1906.00295).

    For every ordered pair a stack `cross(dim)`, in which the tokens of the first modality look at those of the second
    as they came, and for each modality a stack `alone` over what comes out of its pairs, side by side: (modalities - 1)
    x `dim` channels. In front of each stack channels are scaled by the root of their number, and `position` adds a
    vector for the place in the sequence, counted from 1.

    Where a stack is causal, a token sees the other sequence as far ahead as the two differ in length, as the published
    code has it. The tokens of a sample that lacks the other modality skip the attention to it.

    Raises:
        ValueError: a single modality, which has no pair.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        dim: int,
        cross: Callable[[int], nn.Module],
        alone: Callable[[int], nn.Module],
        position: Callable[[int], nn.Module],
    ):
        super().__init__()
        if len(modalities) < 2:
            raise ValueError(f"pairs of {list(modalities)}: name two modalities at least")
        self.others = {name: [other for other in modalities if other != name] for name in modalities}
        width = dim * (len(modalities) - 1)
        self.cross = nn.ModuleDict(
            {name: nn.ModuleDict({other: cross(dim) for other in self.others[name]}) for name in modalities}
        )
        self.alone = nn.ModuleDict({name: alone(width) for name in modalities})
        self.place, self.wide_place = position(dim), position(width)

    def forward(
        self, streams: Mapping[str, Tokens], num_samples: int, visibility: Visibility | None = None
    ) -> dict[str, Tokens]:
        """The tokens of each modality, (modalities - 1) x D channels wide; each sample is one segment."""
        own = {name: _numbered(tokens) for name, tokens in streams.items()}
        placed = {name: _placed(tokens, self.place) for name, tokens in own.items()}
        out = {}
        for name, tokens in placed.items():
            seen = [placed.get(other) for other in self.others[name]]
            stacks = [self.cross.get_submodule(f"{name}.{other}") for other in self.others[name]]
            told = [stack(tokens, _as_context(other, tokens)) for stack, other in zip(stacks, seen, strict=True)]
            joined = tokens.with_x(torch.cat([part.x for part in told], -1))
            out[name] = self.alone[name](_placed(joined, self.wide_place), None, visibility)
        return out


def _numbered(tokens: Tokens) -> Tokens:
    """Each sample's tokens as one segment, in which time is the place from 1 on."""
    return in_order(merge([tokens]), start=1)


def _placed(tokens: Tokens, position: nn.Module) -> Tokens:
    return tokens.with_x(tokens.x * tokens.x.shape[-1] ** 0.5 + position(tokens.position))


def _as_context(other: Tokens | None, tokens: Tokens) -> Tokens:
    """Another modality's tokens, earlier by as much as the sample's two lengths differ; none where it is absent.

    They lie in the order of the samples of `tokens`.
    """
    if other is None:
        return nothing(tokens)
    ahead = (_lengths(tokens) - _lengths(other)).abs()
    time = other.position[..., 0] - ahead[other.sample().clamp(min=0)]
    other = replace(other, position=torch.cat([time[..., None], other.position[..., 1:]], -1))
    if tokens.layout is None:
        return other
    first = tokens.layout.samples
    return merge([other], order=[*first, *sorted(set(range(tokens.num_samples)) - set(first))])


def _lengths(tokens: Tokens) -> Int[Tensor, " N"]:
    """How many tokens each sample has."""
    if tokens.layout is None:
        return tokens.valid.sum(1)
    out = torch.zeros(tokens.num_samples, dtype=torch.long)
    out[list(tokens.layout.samples)] = torch.tensor(tokens.layout.lengths)
    return out.to(tokens.x.device, non_blocking=True)
