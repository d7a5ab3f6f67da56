"""Raw items of one modality to tokens."""

from mmformer.encoders.audio import WaveformEmbedder, mel_convolutions, mel_patches
from mmformer.encoders.encoder import Encoder, Projection
from mmformer.encoders.image import image_convolutions, image_patches
from mmformer.encoders.patches import ClassTokens, LinearPatches, Normalize, PlaneEmbedder, StridedPatches
from mmformer.encoders.text import TextEmbedder

__all__ = [
    "ClassTokens",
    "Encoder",
    "LinearPatches",
    "Normalize",
    "PlaneEmbedder",
    "Projection",
    "StridedPatches",
    "TextEmbedder",
    "WaveformEmbedder",
    "image_convolutions",
    "image_patches",
    "mel_convolutions",
    "mel_patches",
]
