"""Noise of growing strength for pictures, texts and recordings, to see what a model can take.

Every function is pure: what it draws is decided by the id of the row alone, so that a row is degraded alike in every
run, and a larger strength does more of the same: the places of the typos of 5 % are among those of 10 %, noise is the
same noise louder. Pictures are uint8, recordings float waveforms, texts strings, all as they are decoded.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmformer.datasets.random import uniform

Picture = UInt8[Tensor, "height width channels"]
Wave = Float[Tensor, " samples"]

VOICES = 4


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """One way to make a modality worse: `apply(value, strength, id)`, with strengths from mild to severe.

    `strength` says what the numbers are. A smaller number may be the severer one, as for a ratio of signal to noise.
    """

    name: str
    modality: str
    strength: str
    strengths: tuple[float, ...]
    apply: Callable[[Any, float, str], Any]


def blur(picture: Picture, sigma: float, id: str = "") -> Picture:
    """A Gaussian blur with a standard deviation of `sigma` pixels; the edge is continued outwards."""
    if not sigma:
        return picture
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    weights = weights / weights.sum()
    planes = picture.permute(2, 0, 1)[:, None].float()
    planes = F.conv2d(F.pad(planes, (0, 0, reach, reach), "replicate"), weights[None, None, :, None])
    planes = F.conv2d(F.pad(planes, (reach, reach, 0, 0), "replicate"), weights[None, None, None, :])
    return _to_bytes(planes[:, 0].permute(1, 2, 0))


def crop(picture: Picture, share: float, id: str) -> Picture:
    """A part of the picture with `share` of its area, brought to the whole size."""
    height, width, _ = picture.shape
    down, across = (max(1, round(side * math.sqrt(share))) for side in (height, width))
    at = _uniform(id, "crop", 2)
    top, left = int(at[0] * (height - down + 1)), int(at[1] * (width - across + 1))
    part = picture[top : top + down, left : left + across]
    if part.shape == picture.shape:
        return picture
    planes = part.permute(2, 0, 1)[None].float()
    return _to_bytes(F.interpolate(planes, (height, width), mode="bilinear", align_corners=False)[0].permute(1, 2, 0))


def pixel_noise(picture: Picture, deviation: float, id: str) -> Picture:
    """Gaussian noise on every value, its standard deviation a share of the whole range."""
    return _to_bytes(picture + 255 * deviation * _normal(id, "pixel noise", picture.numel()).view(picture.shape))


def jpeg(picture: Picture, quality: float, id: str = "") -> Picture:
    """What is left of a picture that was saved as JPEG with a quality of 100 (best) to 1."""
    pixels = picture.numpy()
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(out, "JPEG", quality=round(quality))
    found = torch.from_numpy(np.array(Image.open(out)))
    return found[..., None] if pixels.shape[2] == 1 else found


def typos(text: str, rate: float, id: str) -> str:
    """Each letter or digit mistyped with probability `rate`: left out, doubled, swapped with the next or replaced.

    It is replaced by another letter of the text. Not everything is ever left out.
    """
    draws = _uniform(id, "typos", 3 * len(text)).reshape(-1, 3)
    out = list(text)
    for i, letter in enumerate(text):
        chance, kind, other = draws[i]
        if chance >= rate or not letter.isalnum():
            continue
        if kind < 0.25:
            out[i] = ""
        elif kind < 0.5:
            out[i] = letter * 2
        elif kind < 0.75 and i + 1 < len(text) and draws[i + 1][0] >= rate:
            out[i], out[i + 1] = text[i + 1], letter
        else:
            out[i] = text[int(other * len(text))]
    return "".join(out) if "".join(out).strip() else text


def drop_words(text: str, rate: float, id: str) -> str:
    """Each word left out with probability `rate`, though never all of them; spaces become single."""
    words = text.split()
    draws = _uniform(id, "words", len(words))
    kept = [word for word, chance in zip(words, draws, strict=True) if chance >= rate]
    return " ".join(kept if kept or not words else [words[int(draws.argmax())]])


def white_noise(wave: Wave, decibel: float, id: str) -> Wave:
    """White noise at a ratio of signal to noise of so many decibels; silence stays silent."""
    return _mix(wave, _normal(id, "white noise", len(wave)), decibel)


def babble(wave: Wave, decibel: float, id: str, others: Mapping[str, Float[Tensor, " _"]]) -> Wave:
    """Other recordings, up to four at once, at a ratio of signal to noise of so many decibels.

    `others` are recordings by the id of their row, of which the row's own is never taken. Each is repeated to the
    length of this one and has an equal share of the noise.

    Raises:
        ValueError: there is no other recording.
    """
    known = sorted(name for name in others if name != id and others[name].any())
    if not known:
        raise ValueError(f"babble for row {id!r} needs the recording of another row, and there is none")
    draws = _uniform(id, "babble", len(known) + VOICES)
    noise = torch.zeros(len(wave))
    for voice, place in enumerate(np.argsort(draws[: len(known)])[:VOICES].tolist()):
        other = others[known[place]]
        start = int(draws[len(known) + voice] * len(other))
        noise += (
            torch.roll(other, -start).repeat(-(-len(wave) // len(other)))[: len(wave)] / other.square().mean().sqrt()
        )
    return _mix(wave, noise, decibel)


def clipping(wave: Wave, share: float, id: str = "") -> Wave:
    """Cut off at `share` of the loudest sample, as by a microphone that is too close."""
    limit = share * wave.abs().max()
    return wave.clamp(-limit, limit)


def standard(recordings: Mapping[str, Float[Tensor, " _"]]) -> tuple[Degradation, ...]:
    """The degradations of a robustness report; babble is made of these recordings, by row, if there are two."""

    def of(name: str, modality: str, strength: str, strengths: tuple[float, ...], apply: Callable) -> Degradation:
        return Degradation(name=name, modality=modality, strength=strength, strengths=strengths, apply=apply)

    decibels = (20.0, 10.0, 5.0, 0.0, -5.0)
    found = [
        of("blur", "image", "sigma in pixels", (0.5, 1.0, 2.0, 4.0, 8.0), blur),
        of("crop", "image", "share of the area", (0.9, 0.75, 0.5, 0.35, 0.2), crop),
        of("pixel noise", "image", "deviation", (0.02, 0.05, 0.1, 0.2, 0.4), pixel_noise),
        of("jpeg", "image", "quality", (75.0, 50.0, 25.0, 10.0, 5.0), jpeg),
        of("typos", "text", "share of letters", (0.02, 0.05, 0.1, 0.2, 0.4), typos),
        of("word drop", "text", "share of words", (0.1, 0.2, 0.3, 0.5, 0.7), drop_words),
        of("white noise", "audio", "signal to noise in dB", decibels, white_noise),
        of("clipping", "audio", "share of the peak", (0.5, 0.25, 0.1, 0.05, 0.02), clipping),
    ]
    if len(recordings) > 1:
        mixed = lambda wave, decibel, id: babble(wave, decibel, id, recordings)  # noqa: E731
        found.append(of("babble", "audio", "signal to noise in dB", decibels, mixed))
    return tuple(found)


def _to_bytes(values: Float[Tensor, "height width channels"]) -> Picture:
    return values.round().clamp(0, 255).to(torch.uint8).contiguous()


def _mix(wave: Wave, noise: Wave, decibel: float) -> Wave:
    """The sum of both, the noise scaled to the power that the ratio asks for."""
    power = noise.square().mean()
    if not len(wave) or not power:
        return wave
    return wave + noise * (wave.square().mean() / power / 10 ** (decibel / 10)).sqrt()


def _uniform(id: str, stream: str, n: int) -> Float[np.ndarray, " n"]:
    """n numbers in [0, 1) that belong to a row."""
    index = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest()) >> 1
    return uniform(0, 0, np.array([index]), stream, n)[0]


def _normal(id: str, stream: str, n: int) -> Float[Tensor, " n"]:
    """n numbers of the standard normal distribution that belong to a row (Box and Muller, 1958)."""
    draws = _uniform(id, stream, 2 * n).reshape(2, n)
    return torch.from_numpy(np.sqrt(-2 * np.log1p(-draws[0])) * np.cos(2 * math.pi * draws[1])).float()
