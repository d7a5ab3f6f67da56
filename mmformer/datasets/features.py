"""Decoded media to the items of a batch: token ids, pictures, log-mel spectrograms, waveforms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from mmformer.datasets.decode import audio_length, decode_audio, decode_image, image_size
from mmformer.datasets.sources import DecodeError
from mmformer.datasets.tokenizers import BOS, EOS, Tokenizer

_FLOOR = 1e-6


@runtime_checkable
class Feature(Protocol):
    """Turns one cell of a manifest, or the same thing in memory, into one item of a Ragged.

    `from_file` says whether its cells name files (or hold their bytes) or are the text itself. The last
    `feature_dims` axes of an item (colours, mel bins) are the same for all items.
    """

    from_file: ClassVar[bool]
    feature_dims: ClassVar[int]

    def __call__(self, value: Any) -> Tensor:
        """The item of a value. Raises DecodeError with the reason where there is none."""
        ...

    def shape(self, value: Any) -> tuple[int, ...]:
        """The shape of the item without its feature axes, from the header alone. Raises DecodeError likewise."""
        ...

    def tokens(self, shape: tuple[int, ...]) -> int:
        """About how many tokens an item of that shape becomes, for budgets."""
        ...


@dataclass(frozen=True)
class Text:
    """A text to token ids, at most `max_length` of them, between a begin and an end token if wanted."""

    tokenizer: Tokenizer
    max_length: int
    begin: bool = False
    end: bool = False

    from_file: ClassVar[bool] = False
    feature_dims: ClassVar[int] = 0

    def __call__(self, value: Any) -> Int[Tensor, " length"]:
        if not isinstance(value, str):
            raise DecodeError(f"a {type(value).__name__}, not a text")
        ids = self.tokenizer.encode(value)[: self.max_length - self.begin - self.end]
        if not ids:
            raise DecodeError("no token: the text is empty or white space")
        return torch.tensor([BOS] * self.begin + ids + [EOS] * self.end)

    def shape(self, value: Any) -> tuple[int, ...]:
        return tuple(self(value).shape)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return shape[0]


@dataclass(frozen=True)
class Picture:
    """A picture to (height, width, channels) uint8.

    `size` makes it a square of that side, cut from the middle when `crop`, squeezed otherwise. Without, it keeps its
    shape: the shorter side becomes `short`, and the longer is at most `longest`, each where given. The sides are
    then rounded to a `multiple`, the patch size. A picture of more than `max_pixels` is refused unread.
    """

    size: int | None = None
    short: int | None = None
    longest: int | None = None
    multiple: int = 1
    channels: int = 3
    crop: bool = True
    max_pixels: int = 50_000_000

    from_file: ClassVar[bool] = True
    feature_dims: ClassVar[int] = 1

    def __call__(self, value: Any) -> UInt8[Tensor, "height width channels"]:
        wanted = min(self._resized(*image_size(value, self.max_pixels)))
        # A margin of two keeps what the decoder's own reduction loses out of sight, as Pillow's thumbnails do.
        picture = decode_image(value, self.max_pixels, 2 * wanted, self.channels)
        height, width = self._resized(*picture.shape[:2])
        if (height, width) != tuple(picture.shape[:2]):
            planes = picture.permute(2, 0, 1)[None]
            planes = F.interpolate(planes, (height, width), mode="bicubic", antialias=True, align_corners=False)
            picture = planes[0].permute(1, 2, 0)
        if self.size is not None:
            top, left = (height - self.size) // 2, (width - self.size) // 2
            picture = picture[top : top + self.size, left : left + self.size]
        return picture.contiguous()

    def shape(self, value: Any) -> tuple[int, ...]:
        height, width = self._resized(*image_size(value, self.max_pixels))
        return (height, width) if self.size is None else (self.size, self.size)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return math.prod(-(-side // self.multiple) for side in shape)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """What a picture is resized to; a square is cut from it afterwards."""
        if self.size is not None and not self.crop:
            return self.size, self.size
        short = self.size or self.short
        scale = short / min(height, width) if short else 1.0
        if self.longest and self.size is None:
            scale = min(scale, self.longest / max(height, width))
        multiple = 1 if self.size else self.multiple
        new = _to_multiple(height * scale, multiple), _to_multiple(width * scale, multiple)
        if math.prod(new) > max(self.max_pixels, height * width):
            raise DecodeError(f"{width} x {height} pixels would become {new[1]} x {new[0]}: more than max_pixels")
        return new


@dataclass(frozen=True)
class Waveform:
    """A recording to its mono samples at `sample_rate`, in float32. `samples_per_token` serves budgets only."""

    sample_rate: int
    max_seconds: float = 60.0
    samples_per_token: int = 320

    from_file: ClassVar[bool] = True
    feature_dims: ClassVar[int] = 0

    def __call__(self, value: Any) -> Float[Tensor, " samples"]:
        return decode_audio(value, self.sample_rate, self.max_seconds)

    def shape(self, value: Any) -> tuple[int, ...]:
        return (audio_length(value, self.sample_rate, self.max_seconds),)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return -(-shape[0] // self.samples_per_token)


@dataclass(frozen=True)
class LogMel:
    """A recording to (frames, num_mels) float32: the logarithm of its mel spectrogram.

    `window` and `hop` are in samples; the transform is `fft` long, by default the next power of two. `frames`
    stretches every recording to that many; without, silence pads it to a `multiple`, the frames of a patch. `normalize`
    gives each recording mean 0 and standard deviation 1.
    """

    waveform: Waveform
    num_mels: int
    window: int
    hop: int
    fft: int | None = None
    frames: int | None = None
    multiple: int = 1
    normalize: bool = True

    from_file: ClassVar[bool] = True
    feature_dims: ClassVar[int] = 1

    def __call__(self, value: Any) -> Float[Tensor, "frames mels"]:
        waveform = self.waveform(value)
        waveform = F.pad(waveform, (0, self._samples(len(waveform)) - len(waveform)))
        spectrum = torch.stft(
            waveform,
            self._fft,
            self.hop,
            self.window,
            _hann(self.window),
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        power = torch.view_as_real(spectrum).square().sum(-1)
        mel = (power.T @ _filters(self._fft // 2 + 1, self.num_mels, self.waveform.sample_rate) + _FLOOR).log()
        if self.frames is not None and len(mel) != self.frames:
            mel = F.interpolate(mel.T[None], self.frames, mode="linear", align_corners=False)[0].T
        if self.normalize:
            mel = (mel - mel.mean()) / (mel.std(correction=0) + 1e-5)
        return mel.contiguous()

    def shape(self, value: Any) -> tuple[int, ...]:
        if self.frames is not None:
            self.waveform.shape(value)  # the header is checked all the same
            return (self.frames,)
        return (1 + self._samples(self.waveform.shape(value)[0]) // self.hop,)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return -(-shape[0] // self.multiple)

    @property
    def _fft(self) -> int:
        return self.fft or 1 << (self.window - 1).bit_length()

    def _samples(self, length: int) -> int:
        """The length to pad a waveform to: at least one transform, and frames in whole patches."""
        length = max(length, self._fft)
        frames = 1 + length // self.hop
        missing = -frames % self.multiple if self.frames is None else 0
        return length if not missing else (frames + missing - 1) * self.hop


def _to_multiple(side: float, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


@lru_cache(maxsize=16)
def _hann(window: int) -> Tensor:
    return torch.hann_window(window)


@lru_cache(maxsize=16)
def _filters(bins: int, num_mels: int, sample_rate: int) -> Float[Tensor, "bins mels"]:
    """Triangular filters on the mel scale of HTK."""
    from torchaudio.functional import melscale_fbanks

    return melscale_fbanks(bins, 0.0, sample_rate / 2, num_mels, sample_rate)
