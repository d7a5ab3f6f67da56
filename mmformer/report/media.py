"""Pictures and sounds small enough to lie inside a page."""

from __future__ import annotations

import io
import wave
from base64 import b64encode
from dataclasses import dataclass

import numpy as np
import soundfile
from jaxtyping import Float
from PIL import Image

SIDE = 192
SMALL = 96
MAX_PIXELS = 50_000_000
SECONDS = 6
RATE = 16_000


@dataclass(frozen=True)
class Picture:
    """A picture as a `data:` address; `small` when it has so few pixels that a browser had better not smooth it."""

    address: str
    small: bool


def picture(data: bytes, side: int = SIDE) -> Picture:
    """A picture file of any format, upright and at most `side` pixels on its longer side.

    Raises:
        ValueError: not a picture, truncated, or above `MAX_PIXELS`.
    """
    from mmformer.datasets.decode import decode_image  # imports torch, which listing runs does without

    pixels = Image.fromarray(decode_image(data, MAX_PIXELS, reduce_to=lambda *_: side).numpy())
    small = max(pixels.size) <= SMALL
    pixels.thumbnail((side, side))
    out = io.BytesIO()
    pixels.save(out, "PNG", optimize=True)
    return Picture(_address("image/png", out.getvalue()), small)


def sound(data: bytes, seconds: int = SECONDS) -> str:
    """A sound file of any format as the `data:` address of a mono WAV: its first `seconds` at `RATE` Hz at most.

    Raises:
        ValueError: not a sound, or without a sample.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            samples = file.read(seconds * rate, dtype="float32", always_2d=True).mean(1)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"not a readable sound: {error}") from error
    if not len(samples):
        raise ValueError("a sound of 0 samples")
    return _address("audio/wav", wav(*_fewer(samples, rate)))


def _fewer(samples: Float[np.ndarray, " N"], rate: int) -> tuple[Float[np.ndarray, " M"], int]:
    """Average neighbouring samples down to about `RATE` Hz: a crude low-pass, good enough to listen to."""
    factor = max(rate // RATE, 1)
    count = max(len(samples) // factor, 1)
    return np.resize(samples, count * factor).reshape(count, factor).mean(1), rate // factor


def wav(samples: Float[np.ndarray, " N"], rate: int) -> bytes:
    """A mono WAV file of 16 bits from samples in [-1, 1]."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return out.getvalue()


def _address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{b64encode(data).decode('ascii')}"
