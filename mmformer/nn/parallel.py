"""Modalities with layers of their own that exchange what they know through a few latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.nn.sequences import Seats, seated
from mmformer.tokens import Tokens
from mmformer.visibility import Sights, Visibility


class Bottleneck(nn.Module):
    """The multimodal bottleneck Transformer (MBT, arXiv 2107.00135): `depth` layers for each modality.

    In each layer every modality runs over its own tokens and the same `num_latents` latents; what the modalities of a
    sample have then made of these is averaged and goes into the next layer. A modality that a sample lacks has no part
    in its mean. One norm for all follows, as in the published code. Without latents, these are separate encoders.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        dim: int,
        depth: int,
        layers: Sequence[Callable[[int], nn.Module]],
        num_latents: int,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim) * 0.02)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: layers[i % len(layers)](dim) for name in modalities}) for i in range(depth)
        )
        self.norm = norm(dim)

    def forward(
        self, streams: Mapping[str, Tokens], num_samples: int, visibility: Visibility | None = None
    ) -> dict[str, Tokens]:
        """The tokens of each modality, mixed; each sample is one segment."""
        seats = {name: seated(tokens, len(self.latents)) for name, tokens in streams.items()}
        sights = {name: Sights(own.tokens, own.tokens, visibility) for name, own in seats.items()}
        mixed = {name: own.tokens for name, own in seats.items()}
        latents = self.latents.expand(num_samples, -1, -1)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            for name, own in seats.items():
                given = own.put(mixed[name], latents.index_select(0, own.samples))
                mixed[name] = layer[name](given, None, sights[name], None)
            latents = _mean([(own, mixed[name]) for name, own in seats.items()], latents)
        return {name: own.rest(mixed[name].with_x(self.norm(mixed[name].x))) for name, own in seats.items()}


def _mean(parts: Sequence[tuple[Seats, Tokens]], before: Float[Tensor, "N K D"]) -> Float[Tensor, "N K D"]:
    """For each sample the mean over its modalities of the latents; what was there before where it has none."""
    if not before.shape[1]:
        return before
    total = torch.zeros_like(before, dtype=parts[0][1].x.dtype)
    count = total.new_zeros(len(before))
    for seats, tokens in parts:
        has = tokens.valid.flatten().index_select(0, seats.where[:, 0]).to(total.dtype)
        total = total.index_add(0, seats.samples, seats.take(tokens) * has[:, None, None])
        count = count.index_add(0, seats.samples, has)
    return torch.where((count > 0)[:, None, None], total / count.clamp(min=1)[:, None, None], before.to(total.dtype))
