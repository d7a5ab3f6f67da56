"""Sound to tokens by convolutions over time alone: wav2vec 2.0's over waveforms, Whisper's over log-mel frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.encoders.encoder import in_rows, packed
from mmformer.tokens import Layout, Tokens


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of (items, channels, time)."""

    def forward(self, x: Float[Tensor, "n C t"]) -> Float[Tensor, "n C t"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class WaveformConvolutions(nn.Module):
    """Strided convolutions over a waveform, each with a norm, then a linear map to `dim` (wav2vec 2.0, 2006.11477).

    `layers` gives (channels, kernel, stride) of each; no padding, so a token covers only real samples. The norm is
    over the channels; with `time_norm` there is only one, behind the first convolution and over the time of each
    channel. `bias` is that of the convolutions, `norm` stands before the linear map.
    """

    def __init__(
        self,
        dim: int,
        layers: Sequence[Sequence[int]],
        *,
        bias: bool = True,
        time_norm: bool = False,
        norm: Callable[[int], nn.Module] | None = None,
        activation: Callable[[], nn.Module] = nn.GELU,
    ):
        super().__init__()
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        channels = 1
        for width, kernel, stride in layers:
            self.convolutions.append(nn.Conv1d(channels, width, kernel, stride, bias=bias))
            self.norms.append(nn.Identity() if time_norm and self.norms else _norm(width, time_norm))
            channels = width
        self.local = not time_norm
        self.shapes = [(kernel, stride) for _, kernel, stride in layers]
        self.activation = activation()
        self.norm = norm(channels) if norm else nn.Identity()
        self.linear = nn.Linear(channels, dim)

    @property
    def stride(self) -> int:
        """Samples from one token to the next."""
        return prod(stride for _, stride in self.shapes)

    @property
    def reach(self) -> int:
        """Samples that one token covers, the fewest a waveform may have."""
        samples = 1
        for kernel, stride in reversed(self.shapes):
            samples = (samples - 1) * stride + kernel
        return samples

    def num_tokens(self, samples: int) -> int:
        """Tokens that a waveform of so many samples gives."""
        for kernel, stride in self.shapes:
            samples = (samples - kernel) // stride + 1
        return samples

    def forward(self, waveform: Float[Tensor, "n s"]) -> Float[Tensor, "n t D"]:
        x = waveform[:, None]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = self.activation(norm(convolution(x)))
        return self.linear(self.norm(x.transpose(1, 2)))


def _norm(channels: int, over_time: bool) -> nn.Module:
    return nn.GroupNorm(channels, channels) if over_time else ChannelNorm(channels)


class FrameConvolutions(nn.Module):
    """Two convolutions of 3 frames over a log-mel spectrogram, the second one halves its length (Whisper, 2212.04356).

    At both ends the frames are continued by zeros.
    """

    local = False  # the second sees what the first makes of the zeros
    reach, stride = 1, 2

    def __init__(self, dim: int, num_mels: int, *, activation: Callable[[], nn.Module] = nn.GELU):
        super().__init__()
        self.first = nn.Conv1d(num_mels, dim, 3, padding=1)
        self.second = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.activation = activation()

    def num_tokens(self, frames: int) -> int:
        """Tokens that so many frames give."""
        return -(-frames // 2)

    def forward(self, frames: Float[Tensor, "n f mels"]) -> Float[Tensor, "n t D"]:
        x = self.activation(self.first(frames.transpose(1, 2)))
        return self.activation(self.second(x)).transpose(1, 2)


class ReadyVectors(nn.Module):
    """Vectors that something else made, a token each."""

    local = True
    reach = stride = 1

    def num_tokens(self, count: int) -> int:
        """As many."""
        return count

    def forward(self, vectors: Float[Tensor, "n t D"]) -> Float[Tensor, "n t D"]:
        return vectors


class TimeEmbedder(nn.Module):
    """Items that have one axis, time, to tokens: waveforms (samples,), spectrograms (frames, mels), vectors (count, D).

    `stem` convolves items of one length; none of them sees another.

    Raises:
        ValueError: an item too short for one token.
    """

    def __init__(
        self,
        dim: int,
        stem: WaveformConvolutions | FrameConvolutions | ReadyVectors,
        position: Callable[[int], nn.Module] | None = None,
        modality: str = "audio",
    ):
        super().__init__()
        self.modality, self.stem = modality, stem
        self.position = position(dim) if position else None

    @property
    def local(self) -> bool:
        """Whether items may be filled up behind their end, as no token changes by it."""
        return self.stem.local

    def padded(self, values: Float[Tensor, "B t *C"], size: Int[Tensor, "B 1"]) -> Tokens:
        """Padded tokens of one item a sample, of which `size` values in time are real; 0 stands for none.

        Unless the embedder is `local`, all items must be real to their end.
        """
        x = self.stem(values)
        place = torch.arange(x.shape[1], device=x.device)
        position = F.pad(place[:, None], (0, 2)).expand(x.shape[0], -1, -1)
        if self.position is not None:
            x = x + self.position(position)
        return in_rows(x, position, self.modality, place * self.stem.stride + self.stem.reach <= size)

    def forward(self, items: Ragged, num_samples: int) -> Tokens:
        lengths = tuple(self.stem.num_tokens(shape[0]) for shape in items.shapes)
        if lengths and min(lengths) < 1:
            raise ValueError(
                f"an item of {items.shapes[0][0]} values in time is shorter than the {self.stem.reach} that the "
                f"convolutions reach: set the feature's min_samples to {self.stem.reach}"
            )
        x = torch.cat([self.stem(group).flatten(0, 1) for group in items.groups()])
        place = np.zeros((len(x), 3), dtype=np.int64)
        layout = Layout(items.rows, lengths, num_samples, items.places)
        place[:, 0] = np.arange(len(x)) - np.repeat(layout.offsets[:-1], lengths)
        position = torch.from_numpy(place).to(x.device, non_blocking=True)
        if self.position is not None:
            x = x + self.position(position)
        return packed(x, position, self.modality, layout)


def waveform_convolutions(
    dim: int,
    layers: Sequence[Sequence[int]],
    position: Callable[[int], nn.Module] | None = None,
    *,
    modality: str = "audio",
    **options: Any,
) -> TimeEmbedder:
    """Convolutions over the waveform itself, `layers` of (channels, kernel, stride).

    `options` as in `WaveformConvolutions`.
    """
    return TimeEmbedder(dim, WaveformConvolutions(dim, layers, **options), position, modality)


def mel_frames(
    dim: int,
    num_mels: int,
    position: Callable[[int], nn.Module] | None = None,
    *,
    modality: str = "audio",
    **options: Any,
) -> TimeEmbedder:
    """A token for every two frames of a log-mel spectrogram, as in Whisper; `options` as in `FrameConvolutions`."""
    return TimeEmbedder(dim, FrameConvolutions(dim, num_mels, **options), position, modality)
