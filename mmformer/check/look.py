"""What one file is: whether it can be read, its checksum, its size, and a fingerprint that copies of it share."""

from __future__ import annotations

import hashlib
import io
import struct
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import soundfile
from jaxtyping import Float, UInt8
from PIL import Image
from torch.nn import functional as F

from mmformer.datasets.decode import decode_image
from mmformer.datasets.features import LogMel, Waveform
from mmformer.datasets.sources import BytesSource, DecodeError, Source

SIDE = 9
"""Rows and columns of a fingerprint."""
_RATE = 8000
_FLAT_PICTURE, _FLAT_SOUND = 1.0, 0.05
"""Fingerprints of less contrast than this (in grey levels, in logarithms of energy) say nothing."""
_DEPTH = 8.0
"""What is quieter than the loudest by this (35 dB) is taken for silence: encodings and noise change it first."""
_WIDE = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Above these a file is refused by its header, as in training."""

    max_pixels: int
    max_seconds: float


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen of a file, or of a text.

    `reason` says why it cannot be used, `note` what is odd about it though it can. `shape` is (width, height) of a
    picture, (seconds, samples a second, channels) of a sound, (characters,) of a text.
    """

    reason: str = ""
    note: str = ""
    digest: str = ""
    size: int = 0
    shape: tuple[float | int, ...] = ()
    fingerprint: Float[np.ndarray, "9 9"] | None = None


def looking(limits: Limits) -> Callable[[tuple[str, Source]], Look]:
    """The function that looks at (modality, source)."""

    def look(asked: tuple[str, Source]) -> Look:
        modality, source = asked
        with source.open() as stream:
            data = stream.read()
        digest = hashlib.sha256(data).hexdigest()
        try:
            found = _KINDS[modality](data, limits) if modality in _KINDS else Look()
        except DecodeError as error:
            found = Look(reason=str(error))
        return Look(**{**vars(found), "digest": digest, "size": len(data)})

    return look


def _picture(data: bytes, limits: Limits) -> Look:
    pixels = decode_image(BytesSource(data, "picture"), limits.max_pixels).numpy()
    return Look(note=riff_note(data), shape=(pixels.shape[1], pixels.shape[0]), fingerprint=picture_print(pixels))


def _sound(data: bytes, limits: Limits) -> Look:
    waveform = Waveform(_RATE, limits.max_seconds)(BytesSource(data, "sound"))
    about = soundfile.info(io.BytesIO(data))
    notes = [riff_note(data), "" if waveform.any() else "silent: every sample is 0"]
    shape = (about.frames / about.samplerate, about.samplerate, about.channels)
    note = "; ".join(filter(None, notes))
    return Look(note=note, shape=shape, fingerprint=sound_print(waveform.numpy()))


_KINDS = {"image": _picture, "audio": _sound}


def look_at_text(text: str) -> Look:
    """A text as it is compared with others: without case, marks of punctuation and white space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in plain).split()
    data = " ".join(words or [plain]).encode("utf-8", "surrogatepass")
    odd = {"\0": "NUL", "\ufffd": "U+FFFD, as a wrong encoding leaves"}
    notes = [f"holds {name}" for char, name in odd.items() if char in text]
    notes += ["holds half of a surrogate pair"] if any("\ud800" <= c <= "\udfff" for c in text) else []
    size = len(text.encode("utf-8", "surrogatepass"))
    return Look(note="; ".join(notes), digest=hashlib.sha256(data).hexdigest(), size=size, shape=(len(text),))


def picture_print(pixels: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, "9 9"] | None:
    """A picture in 81 levels of grey, whose neighbours dHash compares (Krawetz 2013); None where it is flat."""
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return _centred(np.asarray(grey, dtype=np.float32), _FLAT_PICTURE)


def sound_print(samples: Float[np.ndarray, " N"]) -> Float[np.ndarray, "9 9"] | None:
    """The energy of a sound at 8 kHz in 9 mel bands and 9 stretches of time, in logarithms; None where it is flat."""
    mel = LogMel(Waveform(_RATE), SIDE, window=512, hop=256, normalize=False)((samples, _RATE))
    mel = mel.clamp(min=mel.max() - _DEPTH)
    return _centred(F.adaptive_avg_pool1d(mel.T[None], SIDE)[0].numpy(), _FLAT_SOUND)


def _centred(grid: Float[np.ndarray, "9 9"], flat: float) -> Float[np.ndarray, "9 9"] | None:
    grid = grid - grid.mean()
    contrast = float(np.sqrt(np.square(grid).mean()))
    return grid / contrast if contrast > flat else None


def riff_note(data: bytes) -> str:
    """Where the length that a RIFF file (WAV, WebP) states and the length it has disagree; "" where they agree."""
    if len(data) < 12 or data[:4] != b"RIFF":
        return ""
    stated, held = struct.unpack("<I", data[4:8])[0], len(data) - 8
    if stated in (held, held - 1, _WIDE):  # a byte more fills up an odd length
        return ""
    return f"its RIFF header says {stated:,} bytes, {held:,} are there"
