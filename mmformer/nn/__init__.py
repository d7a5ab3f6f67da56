"""Layers that mix tokens."""

from mmformer.nn.attention import Attention, cross_attention
from mmformer.nn.block import Block, FeedForward
from mmformer.nn.position import Learned, LearnedGrid, Rotary, Sinusoid
from mmformer.nn.transformer import Transformer

__all__ = [
    "Attention",
    "Block",
    "FeedForward",
    "Learned",
    "LearnedGrid",
    "Rotary",
    "Sinusoid",
    "Transformer",
    "cross_attention",
]
