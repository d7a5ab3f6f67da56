"""Layers over shortened sequences: groups of tokens in the place of one, or chunks of a document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.nn.chunks import Chunks, check_order, chunked, is_causal, planned, shifted
from mmformer.tokens import PADDING, Tokens, segments
from mmformer.visibility import Sights, Visibility

INSTEAD = "groups of tokens stand where one token did; put layers with this rule beside it"


class Hourglass(nn.Module):
    """Layers over a sequence of a `factor`-th of the length, in the place of one (Hourglass, arXiv 2110.13711).

    Every `factor` tokens of a segment become their mean, the layers run over these, and a linear map gives each of the
    tokens its part of what comes out, added to what it was. Under a causal rule groups end with the first token that
    reads them, so that none sees what is later. A group is of the modality of its first token, and has its position.

    Raises:
        ValueError: a factor below 2; a rule other than causal; causal where time goes back; a memory.
    """

    def __init__(self, dim: int, layers: Sequence[Callable[[int], nn.Module]], factor: int):
        super().__init__()
        if factor < 2:
            raise ValueError(f"a factor of {factor} does not shorten: give at least 2")
        self.factor = factor
        self.layers = nn.ModuleList(layer(dim) for layer in layers)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, factor * dim)

    def forward(
        self,
        tokens: Tokens,
        context: Tokens | None = None,
        sights: Sights | None = None,
        cross_sights: Sights | None = None,
    ) -> Tokens:
        """The tokens after these layers; as a stage, without the rest, all see all."""
        sights, causal = _ruled(tokens, sights, "an hourglass")
        short = planned(sights, shortened, self.factor, sights.visibility, False)
        pooled = short.sights.query.with_x(short.cells(_means(tokens.x, short.chunks, causal)))
        mixed = _run(self.layers, pooled, context, short.sights)
        size = short.chunks.size
        parts = self.up(self.norm(short.flat(mixed.x))).unflatten(-1, (self.factor, -1))[:, :size]
        return tokens.with_x(tokens.x + short.chunks.join(parts))


def _ruled(tokens: Tokens, sights: Sights | None, what: str) -> tuple[Sights, bool]:
    """The sights, where none are given those of all on all, and whether they are causal; refuses other rules."""
    sights = Sights(tokens, tokens) if sights is None else sights
    causal = is_causal(sights, what, INSTEAD)
    if causal:
        check_order(sights, what)
    return sights, causal


class Document(nn.Module):
    """Layers that read a text chunk by chunk, then its chunks as a sequence (hierarchical, as in arXiv 1905.06566).

    `inner` layers see the tokens of one chunk of `chunk` tokens, and nothing else; its mean then stands for it among
    the others in the `outer` layers, and what these make of it goes back to its tokens, added through a linear map.
    Under a causal rule it goes to the tokens of the next chunk. It stands in the place of a layer, or is a stage.

    Raises:
        ValueError: a rule other than causal; causal where time goes back; a memory.
    """

    def __init__(
        self,
        dim: int,
        inner: Sequence[Callable[[int], nn.Module]],
        outer: Sequence[Callable[[int], nn.Module]],
        chunk: int,
    ):
        super().__init__()
        self.chunk = chunk
        self.inner = nn.ModuleList(layer(dim) for layer in inner)
        self.outer = nn.ModuleList(layer(dim) for layer in outer)
        self.norm = nn.LayerNorm(dim)
        self.back = nn.Linear(dim, dim)

    def forward(
        self,
        tokens: Tokens,
        context: Tokens | None = None,
        sights: Sights | None = None,
        cross_sights: Sights | None = None,
    ) -> Tokens:
        """The tokens after these layers; as a stage, without the rest, all see all."""
        sights, causal = _ruled(tokens, sights, "a document of chunks")
        short = planned(sights, shortened, self.chunk, sights.visibility, True)
        apart = Tokens(
            x=short.chunks.cut(tokens.x),
            modality=short.chunks.cut(tokens.modality),
            position=short.chunks.cut(tokens.position),
            segment=torch.where(short.chunks.real, 0, PADDING),
        )
        read = _run(self.inner, apart, None, Sights(apart, apart, sights.visibility))
        read_x = short.chunks.join(read.x)
        pooled = short.sights.query.with_x(short.cells(_means(read_x, short.chunks, False)))
        mixed = self.back(self.norm(short.flat(_run(self.outer, pooled, context, short.sights).x)))
        mixed = shifted(mixed, short.chunks, 1) if causal else mixed
        return tokens.with_x(read_x + short.chunks.join(mixed[:, None].expand(-1, short.chunks.size, -1)))


@dataclass(frozen=True, eq=False)
class Short:
    """Chunks of a sequence, and the sequence of one token for each of them, with who sees whom."""

    chunks: Chunks
    sights: Sights

    def cells(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "B t D"]:
        """Values by chunk as rows of the short sequence."""
        return x.view(*self.sights.query.segment.shape, x.shape[-1])

    def flat(self, x: Float[Tensor, "B t D"]) -> Float[Tensor, "n D"]:
        return x.flatten(0, 1)


def shortened(tokens: Tokens, size: int, rule: Visibility, at_end: bool) -> Short:
    """One token for each chunk, with the position of its first token, or, `at_end`, at the time of its last one."""
    chunks = chunked(tokens, size)
    modality, position = chunks.cut(tokens.modality)[:, 0], chunks.cut(tokens.position)
    place = position[:, 0]
    if at_end:
        time = torch.where(chunks.real, position[..., 0], position[:, :1, 0]).amax(1)
        place = torch.cat([time[:, None], place[:, 1:]], -1)
    if tokens.layout is None:
        rows = (len(tokens.x), -1)
        segment, layout = torch.where(chunks.real[:, 0], 0, PADDING).view(rows), None
    else:
        rows, layout = (1, -1), replace(tokens.layout, lengths=tuple(chunks.counts.tolist()))
        segment = segments(layout, len(chunks), tokens.x.device)
    width = segment.shape[1]
    short = Tokens(
        x=tokens.x.new_empty(*segment.shape, 0),
        modality=modality.view(*segment.shape),
        position=place.view(segment.shape[0], width, 3),
        segment=segment,
        layout=layout,
    )
    return Short(chunks, Sights(short, short, rule))


def _means(x: Float[Tensor, "B T D"], chunks: Chunks, causal: bool) -> Float[Tensor, "n D"]:
    """The mean of each chunk; `causal`: of its first token and those of the chunk before it but the first."""
    cells, real = chunks.cut(x), chunks.real
    if causal:
        cells = torch.cat([cells[:, :1], shifted(cells[:, 1:], chunks, 1)], 1)
        real = torch.cat([real[:, :1], shifted(real[:, 1:], chunks, 1)], 1)
    return cells.sum(1) / real.sum(1, keepdim=True).clamp(min=1).to(x.dtype)


def _run(layers: nn.ModuleList, tokens: Tokens, context: Tokens | None, sights: Sights) -> Tokens:
    cross_sights = None if context is None else Sights(tokens, context)
    for layer in layers:
        tokens = layer(tokens, context, sights, cross_sights)
    return tokens
