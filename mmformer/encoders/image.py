"""Pictures to tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from mmformer.encoders.patches import ClassTokens, ConvolutionStem, LinearPatches, MaskVector, Normalize, PlaneEmbedder


def image_patches(
    dim: int,
    patch: int,
    channels: int,
    position: Callable[[int], nn.Module] | None = None,
    *,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.25,),
    class_tokens: Callable[[int], ClassTokens] | None = None,
    mask: Callable[[int], MaskVector] | None = None,
    modality: str = "image",
) -> PlaneEmbedder:
    """Square patches of pictures of any size and aspect ratio.

    `mean` and `std` are on the scale 0 to 1, one number for each channel or one for all.
    """
    return PlaneEmbedder(
        dim,
        LinearPatches(dim, channels, (patch, patch)),
        _bytes(mean, std),
        modality=modality,
        axes=("row", "column"),
        position=position,
        class_tokens=class_tokens,
        mask=mask,
    )


def image_convolutions(
    dim: int,
    widths: Sequence[int],
    channels: int,
    position: Callable[[int], nn.Module] | None = None,
    *,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.25,),
    class_tokens: Callable[[int], ClassTokens] | None = None,
    mask: Callable[[int], MaskVector] | None = None,
    modality: str = "image",
) -> PlaneEmbedder:
    """A convolution stem, halving the picture once for each of `widths`; mean and std as in `image_patches`."""
    return PlaneEmbedder(
        dim,
        ConvolutionStem(dim, channels, widths),
        _bytes(mean, std),
        modality=modality,
        axes=("row", "column"),
        position=position,
        class_tokens=class_tokens,
        mask=mask,
    )


def _bytes(mean: Sequence[float], std: Sequence[float]) -> Normalize:
    return Normalize([255 * m for m in mean], [255 * s for s in std])
