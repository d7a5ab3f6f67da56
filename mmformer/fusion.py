"""Tokens of all modalities to one sequence: every published fusion is a choice of stream, context and latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.tokens import LATENT, PADDING, Layout, Tokens, latent_tokens, merge
from mmformer.visibility import Visibility


class Mark(nn.Module):
    """Add a learned vector that says which modality a token is of."""

    def __init__(self, dim: int):
        super().__init__()
        self.kind = nn.Parameter(torch.randn(dim) * 0.02)

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(tokens.x + self.kind)


class Mapped(nn.Module):
    """The vectors of tokens through a map that knows nothing of tokens: a linear layer, a norm."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(self.part(tokens.x))


class InOrder(nn.Module):
    """Times 0, 1, 2, ... for the tokens of each segment: a picture that a language model reads token by token."""

    def forward(self, tokens: Tokens) -> Tokens:
        time = np.arange(tokens.x.shape[1])
        if tokens.layout is not None:
            time[: tokens.layout.total] -= np.repeat(tokens.layout.offsets[:-1], tokens.layout.lengths)
        ticks = torch.from_numpy(time).to(tokens.x.device, non_blocking=True).expand_as(tokens.segment)
        return replace(tokens, position=torch.cat([ticks[..., None], tokens.position[..., 1:]], -1))


class Fusion(nn.Module):
    """Join the modalities of each sample into one sequence and let a Transformer mix it.

    `stream` names, in order, what is mixed and comes out; "latent" stands for `num_latents` learned tokens that every
    sample has, so that a sample lacking every other modality still has a row. `context` names what is only looked at,
    by layers with cross-attention. `sequential` counts time through the stream, as causal attention needs.

        concatenation  stream [latent, image, audio, text]
        cross          stream [latent, text], context [image, audio]                      (ALBEF, BLIP)
        latents        stream [latent], context [image, audio, text]                      (Perceiver, Q-Former)
        bottleneck     stream [latent, ...], transformer's sees {image: [image, latent], ..} (MBT, arXiv 2107.00135)
        late           any stream, no transformer, and a pool that mixes

    `pool` makes the one vector a sample that heads read. `entrances` map a modality's tokens before they join (to
    `dim` channels, unless they are context of another width); one that is not named gets a `Mark`.

    Raises:
        ValueError: latents named without a number or the other way round.
    """

    def __init__(
        self,
        dim: int,
        stream: Sequence[str],
        transformer: nn.Module | None,
        pool: nn.Module,
        *,
        context: Sequence[str] = (),
        num_latents: int = 0,
        entrances: Mapping[str, nn.Module] | None = None,
        sequential: bool = False,
    ):
        super().__init__()
        if (LATENT in stream) != (num_latents > 0):
            raise ValueError(
                f"stream {list(stream)} with {num_latents} latents: name {LATENT!r} and give a number above 0"
            )
        self.dim, self.sequential = dim, sequential
        self.stream, self.context = list(stream), list(context)
        self.latents = nn.Parameter(torch.randn(num_latents, dim) * 0.02) if num_latents else None
        given = entrances or {}
        self.entrances = nn.ModuleDict(
            {name: given.get(name) or Mark(dim) for name in [*self.stream, *self.context] if name != LATENT}
        )
        self.transformer, self.pool = transformer, pool

    def forward(self, encoded: dict[str, Tokens], num_samples: int, visibility: Visibility | None = None) -> Tokens:
        """The mixed stream; samples without any token of it have no segment.

        `visibility` adds to the Transformer's own rule: which of the Q-Former's masks, for one.
        """
        packed = all(t.layout is not None for t in encoded.values())
        streams = [
            self._latents(num_samples, packed) if name == LATENT else self.entrances[name](encoded[name])
            for name in self.stream
            if name == LATENT or name in encoded
        ]
        if not streams:
            raise ValueError(
                f"the batch has {sorted(encoded) or 'no modality'} but the stream is {self.stream}: "
                f"put {LATENT!r} into the stream so that every sample has a token"
            )
        tokens = merge(streams, sequential=self.sequential)
        if self.transformer is None:
            return tokens
        return self.transformer(tokens, self._context(encoded, tokens), visibility)

    def _latents(self, num_samples: int, packed: bool) -> Tokens:
        assert self.latents is not None
        return latent_tokens(self.latents, num_samples, packed)

    def _context(self, encoded: dict[str, Tokens], tokens: Tokens) -> Tokens | None:
        """The context in the order of the stream's samples, so that kernels can walk both together."""
        if not self.context:
            return None
        found = [self.entrances[name](encoded[name]) for name in self.context if name in encoded]
        if not found:
            return _nothing(tokens)
        if tokens.layout is None:
            return merge(found)
        first = tokens.layout.samples
        rest = sorted(set(range(tokens.num_samples)) - set(first))
        return merge(found, order=[*first, *rest])

    def summary(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        """One vector a sample."""
        return self.pool(tokens)


class Cascade(nn.Module):
    """Fusions one after another, of which each of `earlier` gives the tokens of a modality to those behind it.

    BLIP's answers look at questions that have looked at the picture: earlier {text: stream [text], context [image]},
    last stream [answer], context [text]. BLIP-2's language model reads its Q-Former: earlier {image: stream [latent],
    context [image]}, last stream [image, text]. One whose inputs a batch lacks is left out; `visibility` is the last's.

    Raises:
        ValueError: an earlier one under the name of a modality that none behind it reads.
    """

    def __init__(self, earlier: Mapping[str, Fusion], last: Fusion):
        super().__init__()
        self.earlier, self.last = nn.ModuleDict(earlier), last
        read = set(last.entrances).union(*(fusion.entrances for fusion in earlier.values()))
        if unread := sorted(set(earlier) - read):
            raise ValueError(f"the cascade makes {unread} but its fusions read {sorted(read)}: name one of these")
        self.stream = last.stream
        self.entrances = read

    def forward(self, encoded: dict[str, Tokens], num_samples: int, visibility: Visibility | None = None) -> Tokens:
        """The stream of the last fusion."""
        found = dict(encoded)
        for name, fusion in self.earlier.items():
            assert isinstance(fusion, Fusion)
            if not found.keys().isdisjoint(fusion.entrances.keys()):
                found[name] = fusion(found, num_samples)
        return self.last(found, num_samples, visibility)

    def summary(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        """One vector a sample."""
        return self.last.summary(tokens)


class View(nn.Module):
    """How one vector of a modality is read off the fusion, where its encoder only embeds: BLIP's texts.

    The fusion is given `modalities` alone, under `visibility` on top of its own rule, and `pool` reads what comes out.
    """

    def __init__(self, modalities: Sequence[str], pool: nn.Module, visibility: Visibility | None = None):
        super().__init__()
        self.modalities, self.pool, self.visibility = list(modalities), pool, visibility


def _nothing(like: Tokens) -> Tokens:
    """A context without tokens, for a batch in which no sample has one."""
    rows = like.x.shape[0]
    return Tokens(
        x=like.x.new_zeros(rows, 0, like.x.shape[-1]),
        modality=like.modality.new_zeros(rows, 0),
        position=like.position.new_zeros(rows, 0, 3),
        segment=like.segment.new_full((rows, 0), PADDING),
        layout=None if like.layout is None else Layout((), (), like.num_samples),
    )
