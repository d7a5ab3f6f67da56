"""The power spectrum of a waveform, and its window."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor


def power_spectrum(
    waveform: Float[Tensor, " samples"], fft: int, hop: int, window: int
) -> Float[Tensor, "frames bins"]:
    """The squared magnitude of the short-time Fourier transform under a Hann window, mirrored at both ends.

    `fft`, `hop` and `window` are in samples; a window shorter than the transform stands in its middle.
    """
    spectrum = torch.stft(
        waveform, fft, hop, window, hann(window), center=True, pad_mode="reflect", return_complex=True
    )
    # Squaring the two parts by themselves takes a fifth of the time of `abs`, or of a sum over pairs.
    return (spectrum.real.square() + spectrum.imag.square()).T


@lru_cache(maxsize=16)
def hann(window: int) -> Float[Tensor, " window"]:
    """The Hann window of that many samples, periodic."""
    return torch.hann_window(window)
