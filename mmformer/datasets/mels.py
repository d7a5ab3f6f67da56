"""The spectrograms that published audio models were trained on, each to its own formula."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mmformer.datasets.features import Waveform
from mmformer.datasets.spectrum import power_spectrum


@dataclass(frozen=True)
class WhisperMel:
    """A recording to (frames, num_mels) as Whisper has it (arXiv 2212.04356), a frame each 10 ms.

    It is filled up with silence, or cut, to `seconds`; with None it keeps its length. The logarithm to base 10 of the
    power reaches 8 below its maximum in the recording.
    """

    waveform: Waveform
    num_mels: int
    seconds: float | None

    from_file: ClassVar[bool] = True
    feature_dims: ClassVar[int] = 1
    _fft: ClassVar[int] = 400
    _hop: ClassVar[int] = 160

    def __call__(self, value: Any) -> Float[Tensor, "frames mels"]:
        waveform = self.waveform(value)
        waveform = _fitted(waveform, self._samples(len(waveform)))
        filters = _slaney_filters(self._fft // 2 + 1, 0.0, 8000.0, self.num_mels, self.waveform.sample_rate)
        power = power_spectrum(waveform, self._fft, self._hop, self._fft)[:-1]
        logarithm = (power @ filters).clamp(min=1e-10).log10()
        return (torch.maximum(logarithm, logarithm.max() - 8.0) + 4.0) / 4.0

    def shape(self, value: Any) -> tuple[int, ...]:
        return (self._samples(self.waveform.shape(value)[0]) // self._hop,)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return -(-shape[0] // 2)

    def _samples(self, length: int) -> int:
        return max(length, self._fft) if self.seconds is None else int(self.seconds * self.waveform.sample_rate)


@dataclass(frozen=True)
class KaldiMel:
    """A recording to (frames, num_mels): Kaldi's filter bank, as AST has it (arXiv 2104.01778), a frame each 10 ms.

    It is filled up with zeros, or cut, to `frames`; with None it keeps its length. That comes before AST's mean and
    standard deviation, which belong to the embedder.
    """

    waveform: Waveform
    num_mels: int
    frames: int | None

    from_file: ClassVar[bool] = True
    feature_dims: ClassVar[int] = 1

    def __call__(self, value: Any) -> Float[Tensor, "frames mels"]:
        from torchaudio.compliance.kaldi import fbank

        waveform = self.waveform(value)
        mel = fbank(
            _at_least(waveform, self._window)[None],
            sample_frequency=self.waveform.sample_rate,
            htk_compat=True,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=self.num_mels,
            dither=0.0,
            frame_shift=10.0,
        )
        if self.frames is None:
            return mel
        return F.pad(mel, (0, 0, 0, max(0, self.frames - len(mel))))[: self.frames].contiguous()

    def shape(self, value: Any) -> tuple[int, ...]:
        samples = max(self.waveform.shape(value)[0], self._window)
        frames = 1 + (samples - self._window) // (self.waveform.sample_rate // 100)
        return (frames if self.frames is None else self.frames,)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return shape[0] * self.num_mels // 100  # AST's patches stand 10 apart both ways

    @property
    def _window(self) -> int:
        return self.waveform.sample_rate // 40


@dataclass(frozen=True)
class ClapMel:
    """A recording to (frames, num_mels) decibels as LAION's CLAP without fusion has it (arXiv 2211.06687).

    A short recording is repeated as often as it fits into `seconds`, the rest is silence; a long one is cut. The
    filters reach from `lowest` to `highest` Hz.
    """

    waveform: Waveform
    num_mels: int
    seconds: float
    lowest: float = 50.0
    highest: float = 14000.0

    from_file: ClassVar[bool] = True
    feature_dims: ClassVar[int] = 1
    _fft: ClassVar[int] = 1024
    _hop: ClassVar[int] = 480

    def __call__(self, value: Any) -> Float[Tensor, "frames mels"]:
        waveform, rate = self.waveform(value), self.waveform.sample_rate
        samples = self._samples
        waveform = _fitted(waveform.repeat(max(1, samples // len(waveform))), samples)
        power = power_spectrum(waveform, self._fft, self._hop, self._fft)
        mel = power @ _slaney_filters(self._fft // 2 + 1, self.lowest, self.highest, self.num_mels, rate)
        return 10.0 * mel.clamp(min=1e-10).log10()

    def shape(self, value: Any) -> tuple[int, ...]:
        self.waveform.shape(value)  # the header is checked all the same
        return (1 + self._samples // self._hop,)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return shape[0] * self.num_mels // 1024  # HTSAT's last stage: one for 32 x 32

    @property
    def _samples(self) -> int:
        return int(self.seconds * self.waveform.sample_rate)


def _fitted(waveform: Float[Tensor, " samples"], length: int) -> Float[Tensor, " length"]:
    return _at_least(waveform, length)[:length]


def _at_least(waveform: Float[Tensor, " samples"], length: int) -> Float[Tensor, " longer"]:
    return F.pad(waveform, (0, max(0, length - len(waveform))))


@lru_cache(maxsize=16)
def _slaney_filters(bins: int, low: float, high: float, num_mels: int, rate: int) -> Float[Tensor, "bins mels"]:
    """Triangular filters of equal area on Slaney's mel scale, as librosa makes them, in double precision before."""
    mels = torch.linspace(_mel(low), _mel(high), num_mels + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) * math.log(6.4) / 27))
    place = torch.linspace(0, rate / 2, bins, dtype=torch.float64)[:, None]
    up = (place - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - place) / (edges[2:] - edges[1:-1])
    return (torch.minimum(up, down).clamp(min=0) * 2 / (edges[2:] - edges[:-2])).float()


def _mel(hertz: float) -> float:
    """Slaney's scale: linear up to 1 kHz, which is 15, and logarithmic above."""
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)
