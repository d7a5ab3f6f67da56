"""Spectrograms to tokens: log-mel patches, or a convolution stem; `waveform.py` has convolutions over time alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from mmformer.encoders.patches import ClassTokens, ConvolutionStem, LinearPatches, MaskVector, Normalize, PlaneEmbedder


def mel_patches(
    dim: int,
    num_mels: int,
    frames: int,
    position: Callable[[int], nn.Module] | None = None,
    *,
    mels: int | None = None,
    class_tokens: Callable[[int], ClassTokens] | None = None,
    mask: Callable[[int], MaskVector] | None = None,
    modality: str = "audio",
) -> PlaneEmbedder:
    """Patches of `frames` x `mels` of a log-mel spectrogram (AST, arXiv 2104.01778); `mels` defaults to all of them."""
    return PlaneEmbedder(
        dim,
        LinearPatches(dim, 1, (frames, mels or num_mels)),
        Normalize([0.0], [1.0]),
        modality=modality,
        axes=("time", "column"),
        position=position,
        class_tokens=class_tokens,
        mask=mask,
    )


def mel_convolutions(
    dim: int,
    num_mels: int,
    widths: Sequence[int],
    position: Callable[[int], nn.Module] | None = None,
    *,
    class_tokens: Callable[[int], ClassTokens] | None = None,
    mask: Callable[[int], MaskVector] | None = None,
    modality: str = "audio",
) -> PlaneEmbedder:
    """A convolution stem over a log-mel spectrogram; one token for each 2 ** len(widths) frames."""
    stem = ConvolutionStem(dim, 1, widths, num_columns=-(-num_mels // 2 ** len(widths)))
    return PlaneEmbedder(
        dim,
        stem,
        Normalize([0.0], [1.0]),
        modality=modality,
        axes=("time", "column"),
        position=position,
        class_tokens=class_tokens,
        mask=mask,
    )
