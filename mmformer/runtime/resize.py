"""Bytes of a picture to another size: bicubic with antialiasing, to the bit as torch resizes uint8 on a CPU."""

from __future__ import annotations

import numpy as np

_SUPPORT, _CURVE = 2.0, -0.5
"""Of the cubic filter (Catmull-Rom), as Pillow and torch take it for antialiasing."""


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, channels) uint8 to (height, width, channels): along rows first, rounded to bytes, then along columns.

    The weights are fixed-point numbers of 16 bits, as in torch's `interpolate(mode="bicubic", antialias=True)`.
    """
    if picture.shape[1] != width:
        picture = _along_columns(picture.transpose(1, 0, 2), width).transpose(1, 0, 2)
    if picture.shape[0] != height:
        picture = _along_columns(picture, height)
    return np.ascontiguousarray(picture)


def _along_columns(picture: np.ndarray, size: int) -> np.ndarray:
    """The first axis of `picture` at another size."""
    windows, bits = _weights(picture.shape[0], size)
    out = np.empty((size, *picture.shape[1:]), dtype=np.uint8)
    for row, (first, weight) in enumerate(windows):
        part = picture[first : first + len(weight)].astype(np.float64)
        total = np.tensordot(weight, part, 1) + (1 << (bits - 1))  # whole numbers below 2 ** 53, so the sums are exact
        out[row] = np.clip(np.floor(total / (1 << bits)), 0, 255)
    return out


def _weights(old: int, new: int) -> tuple[list[tuple[int, np.ndarray]], int]:
    """For each new pixel the first old one that it reads and the fixed-point weights from there, and their bits."""
    scale = old / new
    stretch = max(scale, 1.0)
    support = _SUPPORT * stretch
    windows = []
    for centre in scale * (np.arange(new) + 0.5):
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), old)
        weight = _cubic((np.arange(first, last) - centre + 0.5) / stretch)
        windows.append((first, weight / weight.sum()))
    largest, bits = max(weight.max() for _, weight in windows), 0
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return [(first, np.trunc(w * (1 << bits) + np.copysign(0.5, w))) for first, w in windows], bits


def _cubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), _CURVE
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
