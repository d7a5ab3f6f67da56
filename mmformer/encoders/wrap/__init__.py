"""Backbones of other libraries as encoders: any model of timm, torchvision, transformers or torchaudio."""

from mmformer.encoders.wrap.codec import AudioCodec
from mmformer.encoders.wrap.inputs import MelInput, PictureInput, TextInput, WaveformInput
from mmformer.encoders.wrap.language_model import LanguageModel, WordEmbedding
from mmformer.encoders.wrap.saved import standalone
from mmformer.encoders.wrap.timm import Timm
from mmformer.encoders.wrap.torchaudio import Torchaudio
from mmformer.encoders.wrap.torchvision import Torchvision
from mmformer.encoders.wrap.transformers import Transformers
from mmformer.encoders.wrap.wrapper import Wrapper

__all__ = [
    "AudioCodec",
    "LanguageModel",
    "MelInput",
    "PictureInput",
    "TextInput",
    "Timm",
    "Torchaudio",
    "Torchvision",
    "Transformers",
    "WaveformInput",
    "WordEmbedding",
    "Wrapper",
    "standalone",
]
