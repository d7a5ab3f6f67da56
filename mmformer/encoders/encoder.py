"""An encoder: an embedder that makes tokens of raw items, followed by stages that work on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.nn.memory import Memory, by_token
from mmformer.nn.transformer import Transformer
from mmformer.tokens import PADDING, Layout, Tokens, modality_id, segments


class Encoder(nn.Module):
    """Raw items of one modality to tokens.

    `pool` makes the one vector a sample that heads read which look at this modality alone; the mean where not given.
    """

    def __init__(self, embedder: nn.Module, stages: Sequence[nn.Module] = (), pool: nn.Module | None = None):
        super().__init__()
        self.embedder = embedder
        self.stages = nn.ModuleList(stages)
        self.pool = pool

    def forward(self, items: Ragged, num_samples: int, memory: Memory | None = None) -> Tokens:
        """Tokens of the items; with a `memory`, more of each sample's last item can follow by `extend`."""
        return self._staged(self.embedder(items, num_samples), memory)

    def padded(
        self, values: Shaped[Tensor, "B ..."], size: Int[Tensor, "B axes"], memory: Memory | None = None
    ) -> Tokens:
        """Padded tokens of one item a sample, for export: `values` filled up to one shape, `size` what of it is real.

        A size of 0 stands for a sample that has none. `memory` as in `forward`.

        Raises:
            TypeError: an embedder that has no padded form.
        """
        embedder: Any = self.embedder
        if not hasattr(embedder, "padded"):
            raise TypeError(
                f"{type(embedder).__name__} reads packed items only: give it a method `padded` (docs/new-encoder.md)"
            )
        return self._staged(embedder.padded(values, size), memory)

    def extend(
        self, ids: Int[Tensor, "B n"], position: Int[Tensor, "B n 3"], segment: Int[Tensor, "B n"], memory: Memory
    ) -> Tokens:
        """Padded tokens of further ids, behind those that `memory` knows.

        `position` and `segment` go on from there: the place in the item, and which of the sample's items it is.

        Raises:
            TypeError: an embedder of items that do not come one token at a time, which has no `vectors`.
        """
        embedder: Any = self.embedder
        if not hasattr(embedder, "vectors"):
            raise TypeError(f"{type(embedder).__name__} reads whole items: only texts can be continued")
        x = embedder.vectors(ids, position)
        modality = torch.full_like(ids, modality_id(embedder.modality))
        return self._staged(Tokens(x=x, modality=modality, position=position, segment=segment), memory)

    def _staged(self, tokens: Tokens, memory: Memory | None) -> Tokens:
        for stage in self.stages:
            if memory is None or by_token(stage):
                tokens = stage(tokens)
            elif isinstance(stage, Transformer):
                tokens = stage(tokens, memory=memory)
            else:
                raise TypeError(f"{type(stage).__name__} keeps no memory, so its tokens cannot come one at a time")
        return tokens


class Projection(nn.Module):
    """A stage that changes the number of channels, with a norm in front."""

    by_token = True

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim_in)
        self.linear = nn.Linear(dim_in, dim_out)

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(self.linear(self.norm(tokens.x)))


def packed(
    x: Float[Tensor, "T D"],
    position: Int[Tensor, "T 3"],
    modality: str,
    layout: Layout,
) -> Tokens:
    """Packed tokens of one modality, a segment an item."""
    return Tokens(
        x=x[None],
        modality=torch.full((1, x.shape[0]), modality_id(modality), device=x.device),
        position=position[None],
        segment=segments(layout, x.shape[0], x.device),
        layout=layout,
    )


def in_rows(
    x: Float[Tensor, "B T D"], position: Int[Tensor, "B T 3"], modality: str, valid: Bool[Tensor, "B T"]
) -> Tokens:
    """Padded tokens of one modality, a row a sample."""
    segment = torch.where(valid, 0, PADDING)
    return Tokens(x=x, modality=torch.full_like(segment, modality_id(modality)), position=position, segment=segment)
