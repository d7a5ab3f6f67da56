"""Sound to tokens: log-mel patches, a convolution stem over log-mel frames, or convolutions over the waveform."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.encoders.encoder import packed
from mmformer.encoders.patches import ClassTokens, ConvolutionStem, LinearPatches, Normalize, PlaneEmbedder
from mmformer.tokens import Layout, Tokens


def mel_patches(
    dim: int,
    num_mels: int,
    frames: int,
    position: Callable[[int], nn.Module] | None = None,
    *,
    mels: int | None = None,
    class_tokens: Callable[[int], ClassTokens] | None = None,
    modality: str = "audio",
) -> PlaneEmbedder:
    """Patches of `frames` x `mels` of a log-mel spectrogram (AST, arXiv 2104.01778); `mels` defaults to all of them."""
    return PlaneEmbedder(
        dim,
        LinearPatches(dim, 1, (frames, mels or num_mels)),
        Normalize([0.0], [1.0]),
        modality=modality,
        axes=("time", "column"),
        position=position,
        class_tokens=class_tokens,
    )


def mel_convolutions(
    dim: int,
    num_mels: int,
    widths: Sequence[int],
    position: Callable[[int], nn.Module] | None = None,
    *,
    class_tokens: Callable[[int], ClassTokens] | None = None,
    modality: str = "audio",
) -> PlaneEmbedder:
    """A convolution stem over a log-mel spectrogram; one token for each 2 ** len(widths) frames."""
    stem = ConvolutionStem(dim, 1, widths, num_columns=-(-num_mels // 2 ** len(widths)))
    return PlaneEmbedder(
        dim,
        stem,
        Normalize([0.0], [1.0]),
        modality=modality,
        axes=("time", "column"),
        position=position,
        class_tokens=class_tokens,
    )


class WaveformEmbedder(nn.Module):
    """A waveform to tokens by strided convolutions over time (wav2vec 2.0, arXiv 2006.11477).

    `layers` gives (channels, kernel, stride) of each; no padding, so a token covers only real samples.

    Raises:
        ValueError: a waveform shorter than one token's receptive field.
    """

    def __init__(
        self,
        dim: int,
        layers: Sequence[tuple[int, int, int]],
        position: Callable[[int], nn.Module] | None = None,
        modality: str = "audio",
    ):
        super().__init__()
        self.modality = modality
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        channels = 1
        for width, kernel, stride in layers:
            self.convolutions.append(nn.Conv1d(channels, width, kernel, stride))
            self.norms.append(nn.LayerNorm(width))
            channels = width
        self.shapes = [(kernel, stride) for _, kernel, stride in layers]
        self.linear = nn.Linear(channels, dim)
        self.position = position(dim) if position else None

    def num_tokens(self, samples: int) -> int:
        """Tokens that a waveform of so many samples gives."""
        for kernel, stride in self.shapes:
            samples = (samples - kernel) // stride + 1
        return samples

    def forward(self, items: Ragged, num_samples: int) -> Tokens:
        lengths = tuple(self.num_tokens(shape[0]) for shape in items.shapes)
        if lengths and min(lengths) < 1:
            raise ValueError(
                f"a waveform of {items.shapes[0][0]} samples is shorter than the convolutions reach: "
                "set the feature's minimum length"
            )
        x = self.linear(torch.cat([self._convolve(group).flatten(0, 1) for group in items.groups()]))
        place = np.zeros((len(x), 3), dtype=np.int64)
        layout = Layout(items.rows, lengths, num_samples)
        place[:, 0] = np.arange(len(x)) - np.repeat(layout.offsets[:-1], lengths)
        position = torch.from_numpy(place).to(x.device, non_blocking=True)
        if self.position is not None:
            x = x + self.position(position)
        return packed(x, position, self.modality, layout)

    def _convolve(self, waveform: Float[Tensor, "n s"]) -> Float[Tensor, "n t c"]:
        x = waveform[:, None]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nn.functional.gelu(norm(convolution(x).transpose(1, 2))).transpose(1, 2)
        return x.transpose(1, 2)
