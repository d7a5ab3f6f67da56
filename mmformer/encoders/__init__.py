"""Raw items of one modality to tokens."""

from mmformer.encoders.audio import mel_convolutions, mel_patches
from mmformer.encoders.codes import CodeEmbedder
from mmformer.encoders.encoder import Encoder, Projection
from mmformer.encoders.image import image_convolutions, image_patches
from mmformer.encoders.patches import (
    ClassTokens,
    LinearPatches,
    MaskVector,
    Normalize,
    PatchDropout,
    PlaneEmbedder,
    StridedPatches,
)
from mmformer.encoders.text import TextEmbedder
from mmformer.encoders.waveform import (
    FrameConvolutions,
    ReadyVectors,
    TimeEmbedder,
    WaveformConvolutions,
    mel_frames,
    waveform_convolutions,
)

__all__ = [
    "ClassTokens",
    "CodeEmbedder",
    "Encoder",
    "FrameConvolutions",
    "LinearPatches",
    "MaskVector",
    "Normalize",
    "PatchDropout",
    "PlaneEmbedder",
    "Projection",
    "ReadyVectors",
    "StridedPatches",
    "TextEmbedder",
    "TimeEmbedder",
    "WaveformConvolutions",
    "image_convolutions",
    "image_patches",
    "mel_convolutions",
    "mel_frames",
    "mel_patches",
    "waveform_convolutions",
]
