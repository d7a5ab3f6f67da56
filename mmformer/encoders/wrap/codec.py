"""The codes of a neural audio codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mmformer.batch import Ragged
from mmformer.encoders.wrap.transformers import create


class AudioCodec(nn.Module):
    """A codec of transformers (EnCodec, DAC, Mimi) as it is, for a `CodeEmbedder` to read or a masked model to predict.

    `config` and `weights` are those of `Transformers`; `arguments` go to the codec's `encode`: {bandwidth: 6.0} of
    EnCodec, {n_quantizers: 4} of DAC. It is frozen, and stays in evaluation mode.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a model that has no codebooks.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        num_codebooks: int,
        *,
        weights: str | None,
        arguments: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        codec, described = create(dict(config), weights, "AutoModel")
        if not hasattr(codec, "encode") or not hasattr(codec.config, "codebook_size"):
            raise ValueError(f"{type(codec).__name__} is no codec: it has no codebooks")
        self.backbone = codec.requires_grad_(False)
        self.described: dict[str, Any] = {"config": described}
        self.num_codebooks, self.arguments = num_codebooks, dict(arguments or {})
        self.train(False)

    def train(self, mode: bool = True) -> AudioCodec:
        """It is never trained: it stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def codes_of(self, items: Ragged) -> Ragged:
        """The Q ids of each moment of waveforms (samples,): a grid (moments, 1) for each, of Q int64 ids.

        Raises:
            ValueError: the codec gives fewer than `num_codebooks` ids.
        """
        values, shapes = [], []
        for group in items.groups():
            with torch.autocast(group.device.type, enabled=False):  # ids must not depend on the precision of training
                codes = self.backbone.encode(group[:, None], **self.arguments).audio_codes
            codes = torch.cat(list(codes), -1) if codes.ndim == 4 else codes  # EnCodec gives chunks of time
            if codes.shape[1] < self.num_codebooks:
                raise ValueError(f"the codec gives {codes.shape[1]} ids a moment, fewer than {self.num_codebooks}")
            codes = codes[:, : self.num_codebooks].transpose(1, 2)
            values.append(codes.flatten(0, 1))
            shapes += [(codes.shape[1], 1)] * len(codes)
        return replace(items, values=torch.cat(values), shapes=tuple(shapes))
