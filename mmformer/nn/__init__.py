"""Layers that mix tokens."""

from mmformer.nn.attention import Attention, cross_attention
from mmformer.nn.block import Block, FeedForward
from mmformer.nn.position import Learned, LearnedGrid, Rotary, Sinusoid
from mmformer.nn.quantize import FSQ, Quantized, Quantizer, ResidualVQ, VectorQuantizer
from mmformer.nn.transformer import Transformer

__all__ = [
    "FSQ",
    "Attention",
    "Block",
    "FeedForward",
    "Learned",
    "LearnedGrid",
    "Quantized",
    "Quantizer",
    "ResidualVQ",
    "Rotary",
    "Sinusoid",
    "Transformer",
    "VectorQuantizer",
    "cross_attention",
]
