"""Tokens of all modalities to one sequence: every published fusion is a choice of stream, context and latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.nn.transformer import Transformer
from mmformer.tokens import LATENT, PADDING, Layout, Tokens, merge, modality_id, segments
from mmformer.visibility import Visibility


class Fusion(nn.Module):
    """Join the modalities of each sample into one sequence and let a Transformer mix it.

    `stream` names, in order, what is mixed and comes out; "latent" stands for `num_latents` learned tokens that every
    sample has, so that a sample lacking every other modality still has a row. `context` names what is only looked at,
    by layers with cross-attention. `sequential` counts time through the stream, as causal attention needs.

        concatenation  stream [latent, image, audio, text]
        cross          stream [latent, text], context [image, audio]                      (ALBEF, BLIP)
        latents        stream [latent], context [image, audio, text]                      (Perceiver, Q-Former)
        bottleneck     stream [latent, ...], visibility sees {image: [image, latent], ..} (MBT, arXiv 2107.00135)
        late           any stream, no transformer, and a pool that mixes

    `pool` makes the one vector a sample that heads read.

    Raises:
        ValueError: latents named without a number or the other way round.
    """

    def __init__(
        self,
        dim: int,
        stream: Sequence[str],
        transformer: Transformer | None,
        pool: nn.Module,
        *,
        context: Sequence[str] = (),
        num_latents: int = 0,
        visibility: Visibility | None = None,
        sequential: bool = False,
    ):
        super().__init__()
        if (LATENT in stream) != (num_latents > 0):
            raise ValueError(
                f"stream {list(stream)} with {num_latents} latents: name {LATENT!r} and give a number above 0"
            )
        self.dim, self.sequential, self.visibility = dim, sequential, visibility
        self.stream, self.context = list(stream), list(context)
        self.latents = nn.Parameter(torch.randn(num_latents, dim) * 0.02) if num_latents else None
        self.kinds = nn.ParameterDict(
            {name: torch.randn(dim) * 0.02 for name in [*self.stream, *self.context] if name != LATENT}
        )
        self.transformer, self.pool = transformer, pool

    def forward(self, encoded: dict[str, Tokens], num_samples: int) -> Tokens:
        """The mixed stream; samples without any token of it have no segment."""
        packed = all(t.layout is not None for t in encoded.values())
        streams = [
            self._latent_tokens(num_samples, packed) if name == LATENT else self._mark(name, encoded[name])
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
        return self.transformer(tokens, self._context(encoded, tokens), self.visibility)

    def _mark(self, name: str, tokens: Tokens) -> Tokens:
        return tokens.with_x(tokens.x + self.kinds[name])

    def _latent_tokens(self, num_samples: int, packed: bool) -> Tokens:
        assert self.latents is not None
        count, device = len(self.latents), self.latents.device
        shape = (1, num_samples * count) if packed else (num_samples, count)
        layout = Layout(tuple(range(num_samples)), (count,) * num_samples, num_samples) if packed else None
        return Tokens(
            x=self.latents.expand(num_samples, -1, -1).reshape(*shape, self.dim),
            modality=torch.full(shape, modality_id(LATENT), device=device),
            position=torch.zeros(*shape, 3, dtype=torch.long, device=device),
            segment=segments(layout, shape[1], device)
            if layout
            else torch.zeros(shape, dtype=torch.long, device=device),
            layout=layout,
        )

    def _context(self, encoded: dict[str, Tokens], tokens: Tokens) -> Tokens | None:
        """The context in the order of the stream's samples, so that kernels can walk both together."""
        if not self.context:
            return None
        found = [self._mark(name, encoded[name]) for name in self.context if name in encoded]
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
