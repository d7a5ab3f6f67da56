"""Sequences of tokens on their way through parts: in order, empty, or with latents that take part and leave again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmformer.tokens import PADDING, Layout, Tokens, latent_tokens, merge


@dataclass(frozen=True)
class Seats:
    """A sequence with `count` seats for latents in front of the tokens of each sample that has any.

    Row i of `where` says where the seats of sample `samples[i]` are in the flattened (B T) sequence, and `others` where
    everything else is, padding too. In padded rows samples without tokens have seats as well, which are padding.
    """

    tokens: Tokens
    samples: Int[Tensor, " n"]
    where: Int[Tensor, "n K"]
    others: Int[Tensor, " m"]

    def put(self, tokens: Tokens, latents: Float[Tensor, "n K D"]) -> Tokens:
        """The sequence with these latents in its seats, in the order of `samples`."""
        flat = tokens.x.flatten(0, 1).index_copy(0, self.where.flatten(), latents.flatten(0, 1).to(tokens.x.dtype))
        return tokens.with_x(flat.view_as(tokens.x))

    def take(self, tokens: Tokens) -> Float[Tensor, "n K D"]:
        """The latents that sit in a sequence."""
        return tokens.x.flatten(0, 1).index_select(0, self.where.flatten()).unflatten(0, self.where.shape)

    def rest(self, tokens: Tokens) -> Tokens:
        """A sequence without its latents."""
        count, rows = self.where.shape[1], tokens.x.shape[0]

        def kept(values: Tensor) -> Tensor:
            return values.flatten(0, 1).index_select(0, self.others).unflatten(0, (rows, -1))

        layout = tokens.layout
        if layout is not None:
            layout = replace(layout, lengths=tuple(length - count for length in layout.lengths))
        return Tokens(
            x=kept(tokens.x),
            modality=kept(tokens.modality),
            position=kept(tokens.position),
            segment=kept(tokens.segment),
            layout=layout,
        )


def seated(tokens: Tokens, count: int, in_order: bool = False) -> Seats:
    """Join the tokens of each sample to one segment and make seats in front of it.

    Packed samples come to stand by their length, or by their number if they are to be `in_order`.
    """
    num_samples, device, layout = tokens.num_samples, tokens.x.device, tokens.layout
    blank = tokens.x.new_zeros(count, tokens.x.shape[-1])
    if layout is None:
        seats = latent_tokens(blank, num_samples, packed=False)
        segment = torch.where(tokens.valid.any(1, keepdim=True), seats.segment, PADDING)
        joined = merge([replace(seats, segment=segment), tokens])
        starts, found = np.arange(num_samples) * joined.x.shape[1], np.arange(num_samples)
    else:
        have = tuple(sorted(set(layout.samples)))
        seats = replace(
            latent_tokens(blank, len(have), packed=True), layout=Layout(have, (count,) * len(have), num_samples)
        )
        joined = merge([seats, tokens], order=range(num_samples) if in_order else None)
        assert joined.layout is not None
        starts, found = joined.layout.offsets[:-1], np.asarray(joined.layout.samples, dtype=np.int64)
    where = starts[:, None] + np.arange(count)
    others = np.setdiff1d(np.arange(joined.segment.numel()), where)
    samples, where, others = (torch.from_numpy(a).to(device, non_blocking=True) for a in (found, where, others))
    return Seats(joined, samples, where, others)


def in_order(tokens: Tokens, start: int = 0) -> Tokens:
    """Times `start`, `start` + 1, ... for the tokens of each segment."""
    time = np.arange(start, start + tokens.x.shape[1])
    if tokens.layout is not None:
        time[: tokens.layout.total] -= np.repeat(tokens.layout.offsets[:-1], tokens.layout.lengths)
    ticks = torch.from_numpy(time).to(tokens.x.device, non_blocking=True).expand_as(tokens.segment)
    return replace(tokens, position=torch.cat([ticks[..., None], tokens.position[..., 1:]], -1))


def nothing(like: Tokens) -> Tokens:
    """Tokens of the same batch and channels, of which there are none."""
    return Tokens(
        x=like.x[:, :0],
        modality=like.modality[:, :0],
        position=like.position[:, :0],
        segment=like.segment[:, :0],
        layout=None if like.layout is None else Layout((), (), like.num_samples),
    )
