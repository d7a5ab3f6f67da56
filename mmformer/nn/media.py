"""Pictures and sounds for a language model that looks at them (Flamingo, arXiv 2204.14198)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from mmformer.nn.block import Block
from mmformer.nn.sequences import seated
from mmformer.tokens import PADDING, Layout, Tokens, latent_tokens
from mmformer.visibility import Sights

ALWAYS = 2**62
"""A time that no token reaches."""


class Resampler(nn.Module):
    """A stage after which each item is `num_latents` tokens: learned vectors that have looked at it in every layer.

    A layer is a block with cross-attention, whose context is the item's tokens and the latents themselves behind them
    (figure 5 of the paper): `JointNorm` with `ByModality` gives each of the two its norm. The tokens
    that come out stand at time 0.
    """

    def __init__(
        self,
        dim: int,
        num_latents: int,
        depth: int,
        layers: Sequence[Callable[[int], nn.Module]],
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim) * 0.02)
        self.layers = nn.ModuleList(layers[i % len(layers)](dim) for i in range(depth))
        self.norm = norm(dim)

    def forward(self, tokens: Tokens) -> Tokens:
        """The latents of each segment of packed tokens, of each row of padded ones."""
        items = _apart(tokens)
        seats = seated(items, len(self.latents), in_order=True)
        mixed = latent_tokens(self.latents, items.num_samples, items.layout is not None)
        sights, cross_sights = Sights(mixed, mixed), Sights(mixed, seats.tokens)
        for layer in self.layers:
            latents = mixed.x.reshape(items.num_samples, len(self.latents), -1)
            mixed = layer(mixed, seats.put(seats.tokens, latents), sights, cross_sights)
        return _as_items(mixed.with_x(self.norm(mixed.x)), tokens)


class Conditioned(Block):
    """A layer of a language model behind one, `before`, that looks at a context; without a context it is left out.

    The names of its own parameters are those of the `Block`, so that a language model's weights fit.
    """

    def __init__(self, dim: int, *, before: Callable[[int], nn.Module], **options):
        super().__init__(dim, **options)
        self.before = before(dim)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights, cross_sights: Sights | None) -> Tokens:
        if context is not None:
            tokens = self.before(tokens, context, sights, cross_sights)
        return super().forward(tokens, context, sights, cross_sights)


def in_time(media: Sequence[Tokens], texts: Sequence[Tokens]) -> list[Tokens]:
    """Media with the interval of the texts' time in which each is the latest: position (from, until, 0).

    A medium holds from the first token behind it until the first one behind the sample's next medium. Media at one
    place hold together, and those without a place from the start. Texts count a tick for each token, in the order of
    their places. Padded tokens have no places.
    """
    heard = [tokens.layout for tokens in media if tokens.layout is not None]
    intervals = _intervals(heard, [tokens.layout for tokens in texts if tokens.layout is not None])
    return [replace(tokens, position=_interval_of_tokens(tokens, intervals)) for tokens in media]


def _interval_of_tokens(tokens: Tokens, intervals: Mapping[tuple[int, int], tuple[int, int]]) -> Int[Tensor, "B T 3"]:
    layout = tokens.layout
    if layout is None:
        return tokens.position.new_tensor([0, ALWAYS, 0]).expand_as(tokens.position)
    bounds = [intervals[item] for item in zip(layout.samples, _places(layout), strict=True)]
    position = np.zeros((tokens.x.shape[1], 3), dtype=np.int64)
    position[: layout.total, :2] = np.repeat(np.reshape(bounds, (-1, 2)), layout.lengths, axis=0)
    return torch.from_numpy(position)[None].to(tokens.x.device, non_blocking=True)


def _intervals(media: Sequence[Layout], texts: Sequence[Layout]) -> dict[tuple[int, int], tuple[int, int]]:
    """By sample and place of each medium, the first time at which it holds and the first at which it does not."""
    places, written = defaultdict(set), defaultdict(list)
    for layout in media:
        for sample, place in zip(layout.samples, _places(layout), strict=True):
            places[sample].add(place)
    for layout in texts:
        for sample, place, length in zip(layout.samples, _places(layout), layout.lengths, strict=True):
            written[sample].append((place, length))
    out = {}
    for sample, found in places.items():
        order = sorted(found)
        starts = [sum(length for place, length in written[sample] if place < medium) for medium in order]
        for medium, start, stop in zip(order, starts, [*starts[1:], ALWAYS], strict=True):
            out[sample, medium] = (start, stop)
    return out


def _places(layout: Layout) -> tuple[int, ...]:
    """The place of each item; -1, in front of all others, where there is none."""
    return layout.places or (-1,) * len(layout.samples)


def _apart(tokens: Tokens) -> Tokens:
    """Each segment as a sample of its own."""
    if tokens.layout is None:
        return tokens
    count = len(tokens.layout.lengths)
    return replace(tokens, layout=Layout(tuple(range(count)), tokens.layout.lengths, count))


def _as_items(latents: Tokens, of: Tokens) -> Tokens:
    """Latents in the place of the tokens of the items that they stand for."""
    modality = of.modality[:, :1].expand_as(latents.modality)
    if of.layout is None:
        segment = torch.where(of.valid.any(1, keepdim=True), latents.segment, PADDING)
        return replace(latents, modality=modality, segment=segment)
    assert latents.layout is not None
    return replace(latents, modality=modality, layout=replace(of.layout, lengths=latents.layout.lengths))
