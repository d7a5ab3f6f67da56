"""Decoded media to the items of a batch: token ids, pictures, log-mel spectrograms, waveforms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmformer.datasets.decode import audio_length, decode_audio, decode_image, image_size
from mmformer.datasets.resize import Step
from mmformer.datasets.sources import DecodeError
from mmformer.datasets.spectrum import power_spectrum
from mmformer.datasets.tokenizers import Tokenizer

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
    """A text to at most `max_length` token ids; a longer one loses its end, but none of what is put around it.

    `begin` and `end` put around it what the tokenizer has for that, `pad` fills it up to `max_length`: what fills are
    tokens like others, as SigLIP was trained.

    Raises:
        ValueError: the tokenizer has no such special token, or they leave no room for a text.
    """

    tokenizer: Tokenizer
    max_length: int
    begin: bool = False
    end: bool = False
    pad: bool = False

    from_file: ClassVar[bool] = False
    feature_dims: ClassVar[int] = 0

    def __post_init__(self) -> None:
        specials = self.tokenizer.specials
        has = {"begin": bool(specials.begin), "end": bool(specials.end), "pad": specials.pad is not None}
        if lacking := [name for name, there in has.items() if getattr(self, name) and not there]:
            raise ValueError(
                f"{lacking[0]}=true, but this tokenizer has no token for it: leave it out, or name one where it is read"
            )
        if self._room < 1:
            raise ValueError(f"max_length {self.max_length} leaves no room between the special tokens: give more")

    def __call__(self, value: Any) -> Int[Tensor, " length"]:
        if not isinstance(value, str):
            raise DecodeError(f"a {type(value).__name__}, not a text")
        ids = self.tokenizer.encode(value)[: self._room]
        if not ids:
            raise DecodeError("no token: the text is empty or white space")
        before, behind = self._around
        ids = [*before, *ids, *behind]
        if self.pad:
            ids += [self.tokenizer.specials.pad] * (self.max_length - len(ids))
        return torch.tensor(ids)

    def shape(self, value: Any) -> tuple[int, ...]:
        return tuple(self(value).shape)

    def tokens(self, shape: tuple[int, ...]) -> int:
        return shape[0]

    @property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        specials = self.tokenizer.specials
        return specials.begin if self.begin else (), specials.end if self.end else ()

    @property
    def _room(self) -> int:
        return self.max_length - sum(map(len, self._around))


@dataclass(frozen=True)
class Picture:
    """A picture to (height, width, channels) uint8.

    It keeps its shape: the shorter side becomes `short`, and the longer is at most `longest`, each where given; the
    sides are then rounded to a `multiple`, the patch size. Before that come the `steps` of published weights, such as
    `ShortestSide(224)` and `CentreCrop(224, 224)`. A picture of more than `max_pixels` is refused unread.
    """

    short: int | None = None
    longest: int | None = None
    multiple: int = 1
    channels: int = 3
    steps: Sequence[Step] = ()
    max_pixels: int = 50_000_000

    from_file: ClassVar[bool] = True
    feature_dims: ClassVar[int] = 1

    def __call__(self, value: Any) -> UInt8[Tensor, "height width channels"]:
        # The steps of published weights had the whole picture.
        reduce_to = None if self.steps else lambda height, width: min(self._resized(height, width))
        picture = decode_image(value, self.max_pixels, reduce_to, self.channels)
        if self.steps:
            picture = self._step(picture)
        height, width = self._resized(*picture.shape[:2])
        if (height, width) != tuple(picture.shape[:2]):
            planes = picture.permute(2, 0, 1)[None]
            planes = F.interpolate(planes, (height, width), mode="bicubic", antialias=True, align_corners=False)
            picture = planes[0].permute(1, 2, 0)
        return picture.contiguous()

    def shape(self, value: Any) -> tuple[int, ...]:
        return self._resized(*self._stepped(*image_size(value, self.max_pixels)))

    def tokens(self, shape: tuple[int, ...]) -> int:
        return math.prod(-(-side // self.multiple) for side in shape)

    def _step(self, picture: UInt8[Tensor, "height width channels"]) -> UInt8[Tensor, "h w channels"]:
        self._stepped(*picture.shape[:2])
        pixels = picture.numpy()
        image = Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels)
        for step in self.steps:
            image = step(image)
        found = torch.from_numpy(np.array(image))
        return found[..., None] if self.channels == 1 else found

    def _stepped(self, height: int, width: int) -> tuple[int, int]:
        """The size behind the steps, none of which may blow a picture up."""
        for step in self.steps:
            height, width = self._checked((height, width), step.size(height, width))
        return height, width

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        scale = self.short / min(height, width) if self.short else 1.0
        if self.longest:
            scale = min(scale, self.longest / max(height, width))
        new = _to_multiple(height * scale, self.multiple), _to_multiple(width * scale, self.multiple)
        return self._checked((height, width), new)

    def _checked(self, old: tuple[int, int], new: tuple[int, int]) -> tuple[int, int]:
        if math.prod(new) > max(self.max_pixels, math.prod(old)):
            raise DecodeError(f"{old[1]} x {old[0]} pixels would become {new[1]} x {new[0]}: more than max_pixels")
        return new


@dataclass(frozen=True)
class Waveform:
    """A recording to its mono samples at `sample_rate`, in float32. `samples_per_token` serves budgets only.

    `normalize` gives it mean 0 and variance 1, as wav2vec 2.0 and HuBERT want it; then a short one is filled up with
    zeros to `min_samples`, what the first token of their convolutions reaches.
    """

    sample_rate: int
    max_seconds: float = 60.0
    samples_per_token: int = 320
    normalize: bool = False
    min_samples: int = 0

    from_file: ClassVar[bool] = True
    feature_dims: ClassVar[int] = 0

    def __call__(self, value: Any) -> Float[Tensor, " samples"]:
        waveform = decode_audio(value, self.sample_rate, self.max_seconds)
        if self.normalize:
            waveform = (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-7).sqrt()
        return F.pad(waveform, (0, self.min_samples - len(waveform))) if len(waveform) < self.min_samples else waveform

    def shape(self, value: Any) -> tuple[int, ...]:
        return (max(self.min_samples, audio_length(value, self.sample_rate, self.max_seconds)),)

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
        power = power_spectrum(waveform, self._fft, self.hop, self.window)
        mel = power @ _filters(self._fft // 2 + 1, self.num_mels, self.waveform.sample_rate)
        mel = mel.add_(_FLOOR).log_()
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
def _filters(bins: int, num_mels: int, sample_rate: int) -> Float[Tensor, "bins mels"]:
    """Triangular filters on the mel scale of HTK."""
    from torchaudio.functional import melscale_fbanks

    return melscale_fbanks(bins, 0.0, sample_rate / 2, num_mels, sample_rate)
