"""Files and objects in memory to pictures and waveforms; whatever is wrong with one becomes a DecodeError.

Pillow decodes pictures, as other decoders can crash the process on a damaged file; soundfile decodes sound.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from mmformer.datasets.containers import check_audio_container, check_image_container
from mmformer.datasets.sources import BytesSource, DecodeError, FileSource, Source

_IMAGE_FORMATS = ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "QOI", "ICO"]
"""Those that Pillow decodes by itself: EPS, for one, would start another program."""
_AUDIO_FORMATS = ["WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "MPEG", "AIFF"]
_ORIENTATION = 0x0112
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_KERNEL = 1 << 19


def as_source(value: Any) -> Source:
    """A path or bytes as a source; a source as it is."""
    if isinstance(value, bytes | bytearray | memoryview):
        return BytesSource(bytes(value), "bytes")
    if isinstance(value, str | Path):
        return FileSource(Path(value), str(value))
    if isinstance(value, Source):
        return value
    raise DecodeError(f"a {type(value).__name__}, not a path, bytes or decoded picture or sound")


def image_size(value: Any, max_pixels: int) -> tuple[int, int]:
    """Height and width of a picture as it is seen, from its header.

    Raises:
        DecodeError: not a picture, or one of more than `max_pixels`.
    """
    with _picture(value, max_pixels) as image:
        return _seen(image.size, _orientation(image))


def decode_image(
    value: Any, max_pixels: int, reduce_to: Callable[[int, int], int] | None = None, channels: int = 3
) -> UInt8[Tensor, "height width channels"]:
    """Decode a picture (a source, path, bytes, PIL image, array or tensor) to RGB or, with one channel, grey.

    It is turned as its EXIF orientation says, and what is transparent becomes white. Arrays are (height, width),
    (height, width, channels) or, tensors too, (channels, height, width): uint8, or floats from 0 to 1. `reduce_to` says
    of a picture's height and width how short its sides may become: a JPEG is decoded to a half, a quarter or an eighth
    of its size, as that takes a fraction of the time.

    Raises:
        DecodeError: not a whole picture, or one of more than `max_pixels`.
    """
    with _picture(value, max_pixels) as image:
        if reduce_to and image.format == "JPEG":
            side = reduce_to(*_seen(image.size, _orientation(image)))
            image.draft(None, (side, side))
        image.load()  # before anything else may load it: a failed load does not fail a second time
        orientation = _orientation(image)
        pixels = _to_eight_bits(image)
        if pixels.has_transparency_data:
            over = pixels.convert("RGBA")
            pixels = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
        if pixels.mode != (mode := "L" if channels == 1 else "RGB"):  # else it would be copied
            pixels = pixels.convert(mode)
        if orientation in _TURNED:
            pixels = pixels.transpose(_TURNED[orientation])
        found = torch.from_numpy(np.array(pixels))
        return found[..., None] if channels == 1 else found


@contextmanager
def _picture(value: Any, max_pixels: int) -> Iterator[Image.Image]:
    """An opened picture of a checked size. Whatever Pillow raises inside becomes a DecodeError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its warnings concern metadata, and sizes that are checked here
        try:
            with _open_image(value) as image:
                if image.width * image.height > max_pixels:
                    raise DecodeError(
                        f"{image.width} x {image.height} pixels, more than the limit of {max_pixels:,} (max_pixels)"
                    )
                yield image
        except (DecodeError, MemoryError):
            raise
        except Image.DecompressionBombError:
            raise DecodeError(f"more pixels than Pillow's limit of {2 * (Image.MAX_IMAGE_PIXELS or 0):,}") from None
        except Exception as error:  # a damaged file makes Pillow raise nearly anything, SyntaxError among it
            raise DecodeError(f"not a whole picture: {_brief(error)}") from error


def _open_image(value: Any) -> Any:
    if isinstance(value, Image.Image):
        return _keep_open(value)
    if isinstance(value, np.ndarray | Tensor):
        return _keep_open(_image_from_array(value.numpy(force=True) if isinstance(value, Tensor) else value))
    return _open_image_file(as_source(value))


@contextmanager
def _keep_open(image: Image.Image) -> Iterator[Image.Image]:
    yield image


@contextmanager
def _open_image_file(source: Source) -> Iterator[Image.Image]:
    with source.open() as stream:
        check_image_container(stream)
        with Image.open(stream, formats=_image_formats()) as image:
            yield image


@lru_cache(maxsize=1)
def _image_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _IMAGE_FORMATS if name in Image.OPEN)


def _image_from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or not array.size:
        raise DecodeError(f"an array of shape {array.shape}: give (height, width) or (height, width, 1, 3 or 4)")
    if np.issubdtype(array.dtype, np.floating) or array.dtype == bool:
        array = array.astype(np.float64)
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise DecodeError("an array of floats outside 0 to 1: scale it, or give uint8")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise DecodeError(f"an array of {array.dtype}: give uint8, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(array))


def _seen(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Height and width of a picture once it is turned, of its width and height in the file."""
    width, height = size
    return (width, height) if orientation >= 5 else (height, width)


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # turned by Pillow itself
        return 1
    if image.format == "PNG" and "exif" not in image.info:  # getexif would decode all of it to look behind the pixels
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # metadata too damaged to read turn nothing; the picture itself may be whole
        return 1


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow itself would clip."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DecodeError(f"pixels of mode {image.mode!r} have no known range: save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def audio_length(value: Any, sample_rate: int, max_seconds: float) -> int:
    """Samples of a recording once it has `sample_rate`, from its header.

    Raises:
        DecodeError: not a recording, an empty, cut off or too long one.
    """
    if _in_memory(value):
        array, rate = _checked_array(value, sample_rate, max_seconds)
        return _resampled(len(array), rate, sample_rate)
    with _recording(value, max_seconds) as file:
        return _resampled(file.frames, file.samplerate, sample_rate)


def decode_audio(value: Any, sample_rate: int, max_seconds: float) -> Float[Tensor, " samples"]:
    """Decode a recording (a source, path, bytes, or an array or tensor with its rate) to a mono waveform.

    Channels are averaged and the rate becomes `sample_rate`. In memory it is (array, rate), or an array of this rate,
    of (samples,), (samples, channels) or (channels, samples): floats, or integers, which are scaled to -1 to 1.

    Raises:
        DecodeError: not a whole recording, an empty one, one of more than `max_seconds` or with a value not finite.
    """
    if _in_memory(value):
        samples, rate = _checked_array(value, sample_rate, max_seconds)
    else:
        with _recording(value, max_seconds) as file:
            rate, expected = file.samplerate, file.frames
            samples = file.read(dtype="float32", always_2d=True)
            if len(samples) < expected:
                raise DecodeError(f"cut off: {len(samples)} of {expected} samples are there")
    if not np.isfinite(samples).all():
        raise DecodeError(f"{int((~np.isfinite(samples)).sum())} samples are NaN or infinite")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    waveform = torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))
    return waveform if rate == sample_rate else _resample(waveform, rate, sample_rate)


@contextmanager
def _recording(value: Any, max_seconds: float) -> Iterator[soundfile.SoundFile]:
    """An opened recording of a checked length. Whatever soundfile raises inside becomes a DecodeError."""
    source = as_source(value)
    with source.open() as stream:
        check_audio_container(stream)
        try:
            with soundfile.SoundFile(stream) as file:
                _check_header(file, max_seconds)
                yield file
        except (DecodeError, MemoryError):
            raise
        except Exception as error:
            raise DecodeError(f"not a whole recording: {_brief(error)}") from error


def _check_header(file: soundfile.SoundFile, max_seconds: float) -> None:
    if file.format not in _AUDIO_FORMATS:
        raise DecodeError(f"{file.format} is not read: give wav, flac, ogg, opus, mp3 or aiff")
    _check_length(file.frames, file.samplerate, max_seconds)


def _check_length(frames: int, rate: int, max_seconds: float) -> None:
    if rate <= 0:
        raise DecodeError(f"a sample rate of {rate}")
    if frames <= 0:
        raise DecodeError("zero-length: it holds no samples")
    if frames / rate > max_seconds:
        raise DecodeError(f"{frames / rate:,.1f} s, more than the limit of {max_seconds:g} s (max_seconds)")


def _in_memory(value: Any) -> bool:
    return isinstance(value, tuple | list | np.ndarray | Tensor)


def _checked_array(value: Any, sample_rate: int, max_seconds: float) -> tuple[np.ndarray, int]:
    """(samples, channels) float32 of a recording in memory, and its rate."""
    array, rate = value if isinstance(value, tuple) and len(value) == 2 else (value, sample_rate)
    array = array.numpy(force=True) if isinstance(array, Tensor) else np.asarray(array)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DecodeError(f"an array of {array.dtype} of shape {array.shape}: give (samples,) or (samples, channels)")
    if array.shape[0] < array.shape[1]:
        array = array.T
    if array.dtype.kind == "u":
        array = (array.astype(np.float32) - 2.0 ** (8 * array.itemsize - 1)) / 2.0 ** (8 * array.itemsize - 1)
    elif array.dtype.kind == "i":
        array = array / 2.0 ** (8 * array.itemsize - 1)
    _check_length(len(array) if array.size else 0, int(rate), max_seconds)
    return array.astype(np.float32), int(rate)


def _reduced(rate: int, sample_rate: int) -> tuple[int, int]:
    """The two rates in lowest terms, slightly rounded where the filter for the exact ratio would fill the memory."""
    step = 1
    while True:
        nearest = max(1, round(rate / step)) * step
        common = math.gcd(nearest, sample_rate)
        if (nearest // common) * (sample_rate // common) <= _MAX_KERNEL:
            return nearest // common, sample_rate // common
        step *= 2 if sample_rate % (2 * step) == 0 else 5


def _resampled(frames: int, rate: int, sample_rate: int) -> int:
    old, new = _reduced(rate, sample_rate)
    return math.ceil(frames * new / old)


@lru_cache(maxsize=32)
def _resampler(old: int, new: int) -> Any:
    from torchaudio.transforms import Resample

    return Resample(old, new)


def _resample(waveform: Float[Tensor, " samples"], rate: int, sample_rate: int) -> Float[Tensor, " new"]:
    return _resampler(*_reduced(rate, sample_rate))(waveform)


def _brief(error: Exception) -> str:
    """The first line of a message, without the stream's address in it."""
    text = getattr(error, "error_string", "") or str(error) or type(error).__name__
    return re.sub(r"\s*<_io\.[^>]*>", "", text.splitlines()[0])
