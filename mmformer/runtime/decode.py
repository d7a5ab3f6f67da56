"""Files and objects in memory to pictures and waveforms, as `mmformer.datasets.decode` has them, without torch.

Tests hold the two equal, byte by byte.
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

from mmformer.datasets.containers import check_audio_container, check_image_container
from mmformer.datasets.sources import BytesSource, DecodeError, FileSource, Source

_IMAGE_FORMATS = ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "QOI", "ICO"]
_AUDIO_FORMATS = ["WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "MPEG", "AIFF"]
_ORIENTATION = 0x0112
_TURNED = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
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


def decode_image(
    value: Any, max_pixels: int, reduce_to: Callable[[int, int], int] | None = None, channels: int = 3
) -> np.ndarray:
    """Decode a picture (a source, path, bytes, PIL image or array) to (height, width, channels) uint8.

    All else as in `mmformer.datasets.decode.decode_image`.

    Raises:
        DecodeError: not a whole picture, or one of more than `max_pixels`.
    """
    from PIL import Image

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
        if pixels.mode != (mode := "L" if channels == 1 else "RGB"):
            pixels = pixels.convert(mode)
        if orientation in _TURNED:
            pixels = pixels.transpose(Image.Transpose[_TURNED[orientation]])
        found = np.array(pixels)
        return found[..., None] if channels == 1 else found


@contextmanager
def _picture(value: Any, max_pixels: int) -> Iterator[Any]:
    """An opened picture of a checked size. Whatever Pillow raises inside becomes a DecodeError."""
    from PIL import Image

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


@contextmanager
def _open_image(value: Any) -> Iterator[Any]:
    from PIL import Image

    if isinstance(value, Image.Image):
        yield value
    elif isinstance(value, np.ndarray):
        yield _image_from_array(value)
    else:
        with as_source(value).open() as stream:
            check_image_container(stream)
            with Image.open(stream, formats=_image_formats()) as image:
                yield image


@lru_cache(maxsize=1)
def _image_formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in _IMAGE_FORMATS if name in Image.OPEN)


def _image_from_array(array: np.ndarray) -> Any:
    from PIL import Image

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


def _orientation(image: Any) -> int:
    if image.format == "TIFF":  # turned by Pillow itself
        return 1
    if image.format == "PNG" and "exif" not in image.info:  # getexif would decode all of it to look behind the pixels
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # metadata too damaged to read turn nothing; the picture itself may be whole
        return 1


def _to_eight_bits(image: Any) -> Any:
    """16-bit grey scaled to 8 bits, which Pillow itself would clip."""
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DecodeError(f"pixels of mode {image.mode!r} have no known range: save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def decode_audio(value: Any, sample_rate: int, max_seconds: float) -> np.ndarray:
    """Decode a recording (a source, path, bytes, or an array with its rate) to a mono waveform, (samples,) float32.

    All else as in `mmformer.datasets.decode.decode_audio`; the rate becomes `sample_rate`.

    Raises:
        DecodeError: not a whole recording, an empty one, one of more than `max_seconds` or with a value not finite.
    """
    if isinstance(value, tuple | list | np.ndarray):
        samples, rate = _checked_array(value, sample_rate, max_seconds)
    else:
        with _recording(value, max_seconds) as file:
            rate, expected = file.samplerate, file.frames
            samples = file.read(dtype="float32", always_2d=True)
            if len(samples) < expected:
                raise DecodeError(f"cut off: {len(samples)} of {expected} samples are there")
    if not np.isfinite(samples).all():
        raise DecodeError(f"{int((~np.isfinite(samples)).sum())} samples are NaN or infinite")
    waveform = np.ascontiguousarray(samples.mean(axis=1), dtype=np.float32)
    return waveform if rate == sample_rate else resample(waveform, rate, sample_rate)


@contextmanager
def _recording(value: Any, max_seconds: float) -> Iterator[Any]:
    """An opened recording of a checked length. Whatever soundfile raises inside becomes a DecodeError."""
    import soundfile

    with as_source(value).open() as stream:
        check_audio_container(stream)
        try:
            with soundfile.SoundFile(stream) as file:
                if file.format not in _AUDIO_FORMATS:
                    raise DecodeError(f"{file.format} is not read: give wav, flac, ogg, opus, mp3 or aiff")
                _check_length(file.frames, file.samplerate, max_seconds)
                yield file
        except (DecodeError, MemoryError):
            raise
        except Exception as error:
            raise DecodeError(f"not a whole recording: {_brief(error)}") from error


def _check_length(frames: int, rate: int, max_seconds: float) -> None:
    if rate <= 0:
        raise DecodeError(f"a sample rate of {rate}")
    if frames <= 0:
        raise DecodeError("zero-length: it holds no samples")
    if frames / rate > max_seconds:
        raise DecodeError(f"{frames / rate:,.1f} s, more than the limit of {max_seconds:g} s (max_seconds)")


def _checked_array(value: Any, sample_rate: int, max_seconds: float) -> tuple[np.ndarray, int]:
    """(samples, channels) float32 of a recording in memory, and its rate."""
    array, rate = value if isinstance(value, tuple) and len(value) == 2 else (value, sample_rate)
    array = np.asarray(array)
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


def resample(waveform: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """Another sample rate, by a windowed sinc (Hann, 6 zero crossings, roll-off 0.99): torchaudio's default."""
    old, new = _reduced(rate, sample_rate)
    if old == new:
        return waveform
    kernel, width = _kernel(old, new)
    length = math.ceil(new * len(waveform) / old)
    padded = np.pad(waveform, (width, width + old))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[0])[::old]
    step = max(1, (1 << 21) // kernel.shape[0])  # a few windows at a time, as they overlap
    parts = [np.ascontiguousarray(windows[i : i + step]) @ kernel for i in range(0, len(windows), step)]
    return np.concatenate(parts).reshape(-1)[:length]


def _reduced(rate: int, sample_rate: int) -> tuple[int, int]:
    """The two rates in lowest terms, slightly rounded where the filter for the exact ratio would fill the memory."""
    step = 1
    while True:
        nearest = max(1, round(rate / step)) * step
        common = math.gcd(nearest, sample_rate)
        if (nearest // common) * (sample_rate // common) <= _MAX_KERNEL:
            return nearest // common, sample_rate // common
        step *= 2 if sample_rate % (2 * step) == 0 else 5


@lru_cache(maxsize=8)
def _kernel(old: int, new: int, zeros: int = 6, roll_off: float = 0.99) -> tuple[np.ndarray, int]:
    """(taps, new) of the filter, a column for each sample between two old ones, and how far it reaches back."""
    base = min(old, new) * roll_off
    width = math.ceil(zeros * old / base)
    phase = (np.arange(0, -new, -1, dtype=np.float32) / np.float32(new)).astype(np.float64)
    time = np.clip((phase + np.arange(-width, width + old)[:, None] / old) * base, -zeros, zeros)
    window = np.cos(time * math.pi / zeros / 2) ** 2
    return (np.sinc(time) * window * base / old).astype(np.float32), width


def _brief(error: Exception) -> str:
    """The first line of a message, without the stream's address in it."""
    text = getattr(error, "error_string", "") or str(error) or type(error).__name__
    return re.sub(r"\s*<_io\.[^>]*>", "", text.splitlines()[0])
