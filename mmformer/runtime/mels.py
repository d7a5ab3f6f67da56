"""The spectrograms of `mmformer.datasets.features` and `mmformer.datasets.mels`, in numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from mmformer.runtime.decode import decode_audio

_FLOOR = 1e-6
_EPSILON = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Waveform:
    """A recording to its mono samples (samples,) float32."""

    sample_rate: int
    max_seconds: float
    samples_per_token: int
    normalize: bool
    min_samples: int

    axes: ClassVar[int] = 1

    def __call__(self, value: Any) -> np.ndarray:
        waveform = decode_audio(value, self.sample_rate, self.max_seconds)
        if self.normalize:
            waveform = (waveform - waveform.mean()) / np.sqrt(waveform.var() + np.float32(1e-7))
        return _at_least(waveform, self.min_samples)


@dataclass(frozen=True)
class LogMel:
    """A recording to the logarithm of its mel spectrogram, (frames, num_mels) float32."""

    waveform: Waveform
    num_mels: int
    window: int
    hop: int
    fft: int | None
    frames: int | None
    multiple: int
    normalize: bool

    axes: ClassVar[int] = 1

    def __call__(self, value: Any) -> np.ndarray:
        fft = self.fft or 1 << (self.window - 1).bit_length()
        waveform = self.waveform(value)
        waveform = _at_least(waveform, self._samples(len(waveform), fft))
        power = _power(waveform, fft, self.hop, self.window)
        mel = np.log(power @ _htk_filters(fft // 2 + 1, self.waveform.sample_rate, self.num_mels) + _FLOOR)
        if self.frames is not None and len(mel) != self.frames:
            mel = _stretched(mel, self.frames)
        if self.normalize:
            mel = (mel - mel.mean()) / (mel.std() + 1e-5)
        return mel.astype(np.float32)

    def _samples(self, length: int, fft: int) -> int:
        length = max(length, fft)
        frames = 1 + length // self.hop
        missing = -frames % self.multiple if self.frames is None else 0
        return length if not missing else (frames + missing - 1) * self.hop


@dataclass(frozen=True)
class WhisperMel:
    """A recording to (frames, num_mels) float32 as Whisper has it (arXiv 2212.04356)."""

    waveform: Waveform
    num_mels: int
    seconds: float | None

    axes: ClassVar[int] = 1

    def __call__(self, value: Any) -> np.ndarray:
        waveform, rate = self.waveform(value), self.waveform.sample_rate
        samples = max(len(waveform), 400) if self.seconds is None else int(self.seconds * rate)
        power = _power(_at_least(waveform, samples)[:samples], 400, 160, 400)[:-1]
        mel = np.log10(np.maximum(power @ _slaney_filters(201, 0.0, 8000.0, self.num_mels, rate), 1e-10))
        return ((np.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0).astype(np.float32)


@dataclass(frozen=True)
class KaldiMel:
    """A recording to (frames, num_mels) float32: Kaldi's filter bank, as AST has it (arXiv 2104.01778)."""

    waveform: Waveform
    num_mels: int
    frames: int | None

    axes: ClassVar[int] = 1

    def __call__(self, value: Any) -> np.ndarray:
        rate = self.waveform.sample_rate
        window, shift = rate // 40, rate // 100
        fft = 1 << (window - 1).bit_length()
        waveform = _at_least(self.waveform(value), window).astype(np.float64)
        frames = np.lib.stride_tricks.sliding_window_view(waveform, window)[::shift]
        frames = frames - frames.mean(1, keepdims=True)
        frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], 1)  # pre-emphasis
        power = np.abs(np.fft.rfft(frames * np.hanning(window), fft)) ** 2
        mel = np.log(np.maximum(power @ _kaldi_filters(fft, rate, self.num_mels), _EPSILON)).astype(np.float32)
        if self.frames is None:
            return mel
        return np.pad(mel, ((0, max(0, self.frames - len(mel))), (0, 0)))[: self.frames]


@dataclass(frozen=True)
class ClapMel:
    """A recording to (frames, num_mels) decibels as LAION's CLAP has it (arXiv 2211.06687)."""

    waveform: Waveform
    num_mels: int
    seconds: float
    lowest: float
    highest: float

    axes: ClassVar[int] = 1

    def __call__(self, value: Any) -> np.ndarray:
        waveform, rate = self.waveform(value), self.waveform.sample_rate
        samples = int(self.seconds * rate)
        waveform = np.tile(waveform, max(1, samples // len(waveform)))
        power = _power(_at_least(waveform, samples)[:samples], 1024, 480, 1024)
        mel = power @ _slaney_filters(513, self.lowest, self.highest, self.num_mels, rate)
        return (10.0 * np.log10(np.maximum(mel, 1e-10))).astype(np.float32)


def _at_least(waveform: np.ndarray, length: int) -> np.ndarray:
    return np.pad(waveform, (0, max(0, length - len(waveform))))


def _power(waveform: np.ndarray, fft: int, hop: int, window: int) -> np.ndarray:
    """(frames, bins) power under a periodic Hann window in the middle of each transform, mirrored at the ends."""
    padded = np.pad(waveform.astype(np.float64), fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, fft)[::hop]
    shape = np.zeros(fft)
    left = (fft - window) // 2
    shape[left : left + window] = np.hanning(window + 1)[:-1]
    spectrum = np.fft.rfft(frames * shape)
    return spectrum.real**2 + spectrum.imag**2


def _stretched(mel: np.ndarray, frames: int) -> np.ndarray:
    """Another number of frames by linear interpolation between their centres, whose places have 32 bits as in torch."""
    scale = np.float32(len(mel)) / np.float32(frames)
    place = np.maximum(scale * (np.arange(frames, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
    before = place.astype(np.int64)
    after = np.minimum(before + 1, len(mel) - 1)
    share = (place - before)[:, None]
    return mel[before] * (1 - share) + mel[after] * share


@lru_cache(maxsize=8)
def _htk_filters(bins: int, rate: int, num_mels: int) -> np.ndarray:
    """(bins, num_mels) triangles on the mel scale of HTK."""
    mels = np.linspace(0.0, 2595.0 * math.log10(1.0 + rate / 2 / 700.0), num_mels + 2)
    return _triangles(np.linspace(0, rate // 2, bins), 700.0 * (10.0 ** (mels / 2595.0) - 1.0))


@lru_cache(maxsize=8)
def _slaney_filters(bins: int, low: float, high: float, num_mels: int, rate: int) -> np.ndarray:
    """(bins, num_mels) triangles of equal area on Slaney's mel scale."""
    mels = np.linspace(_slaney(low), _slaney(high), num_mels + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * math.log(6.4) / 27))
    return _triangles(np.linspace(0, rate / 2, bins), edges) * 2 / (edges[2:] - edges[:-2])


@lru_cache(maxsize=8)
def _kaldi_filters(fft: int, rate: int, num_mels: int) -> np.ndarray:
    """(fft / 2 + 1, num_mels) triangles, straight on Kaldi's mel scale, from 20 Hz on; the last bin counts nothing."""
    places = 1127.0 * np.log(1.0 + rate / fft * np.arange(fft // 2) / 700.0)
    low, high = (1127.0 * math.log(1.0 + hertz / 700.0) for hertz in (20.0, rate / 2))
    return np.pad(_triangles(places, np.linspace(low, high, num_mels + 2)), ((0, 1), (0, 0)))


def _triangles(places: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """At each place the height of triangles that rise from one edge to the next and fall to the one behind it."""
    up = (places[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - places[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(up, down), 0.0)


def _slaney(hertz: float) -> float:
    """Slaney's scale: linear up to 1 kHz, which is 15, and logarithmic above."""
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)
