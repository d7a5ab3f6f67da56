"""An encoder: an embedder that makes tokens of raw items, followed by stages that work on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.tokens import Layout, Tokens, modality_id, segments


class Encoder(nn.Module):
    """Raw items of one modality to tokens.

    `pool` makes the one vector a sample that heads read which look at this modality alone; the mean where not given.
    """

    def __init__(self, embedder: nn.Module, stages: Sequence[nn.Module] = (), pool: nn.Module | None = None):
        super().__init__()
        self.embedder = embedder
        self.stages = nn.ModuleList(stages)
        self.pool = pool

    def forward(self, items: Ragged, num_samples: int) -> Tokens:
        tokens = self.embedder(items, num_samples)
        for stage in self.stages:
            tokens = stage(tokens)
        return tokens


class Projection(nn.Module):
    """A stage that changes the number of channels, with a norm in front."""

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
