"""Layers that mix tokens."""

from mmformer.nn.activation import QuickGELU
from mmformer.nn.attention import Attention, CrossAttention
from mmformer.nn.bias import RelativeBias
from mmformer.nn.block import Block, FeedForward
from mmformer.nn.branch import ContextNorm, Gated, Scaled
from mmformer.nn.causality import ByCausality
from mmformer.nn.crossmodal import Crossmodal, JointNorm, Residual
from mmformer.nn.deformable import DeformableAttention
from mmformer.nn.experts import ByModality
from mmformer.nn.hierarchical import HierarchicalAttention
from mmformer.nn.hourglass import Document, Hourglass
from mmformer.nn.linear import LinearAttention
from mmformer.nn.looped import Looped
from mmformer.nn.media import Conditioned, Resampler
from mmformer.nn.memory import Memory
from mmformer.nn.multiway import MultiwayAttention
from mmformer.nn.parallel import Bottleneck
from mmformer.nn.pool import AttentionPool
from mmformer.nn.position import (
    BandScaling,
    ConvolutionPosition,
    GridTable,
    Learned,
    LearnedGrid,
    LinearScaling,
    NormedRotary,
    PositionBeside,
    Rotary,
    Sinusoid,
    SinusoidTable,
    StretchedGrid,
)
from mmformer.nn.quantize import FSQ, Quantized, Quantizer, ResidualVQ, VectorQuantizer
from mmformer.nn.recursive import Recursive
from mmformer.nn.reduction import Shrinking, TokenMerging, TokenPruning
from mmformer.nn.routed import Routed
from mmformer.nn.span import AdaptiveSpan
from mmformer.nn.statespace import BothWays, Mamba2
from mmformer.nn.swin import PatchMerging, SwinAttention
from mmformer.nn.transformer import Transformer

__all__ = [
    "FSQ",
    "AdaptiveSpan",
    "Attention",
    "AttentionPool",
    "BandScaling",
    "Block",
    "BothWays",
    "Bottleneck",
    "ByCausality",
    "ByModality",
    "Conditioned",
    "ContextNorm",
    "ConvolutionPosition",
    "CrossAttention",
    "Crossmodal",
    "DeformableAttention",
    "Document",
    "FeedForward",
    "Gated",
    "GridTable",
    "HierarchicalAttention",
    "Hourglass",
    "JointNorm",
    "Learned",
    "LearnedGrid",
    "LinearAttention",
    "LinearScaling",
    "Looped",
    "Mamba2",
    "Memory",
    "MultiwayAttention",
    "NormedRotary",
    "PatchMerging",
    "PositionBeside",
    "Quantized",
    "Quantizer",
    "QuickGELU",
    "Recursive",
    "RelativeBias",
    "Resampler",
    "Residual",
    "ResidualVQ",
    "Rotary",
    "Routed",
    "Scaled",
    "Shrinking",
    "Sinusoid",
    "SinusoidTable",
    "StretchedGrid",
    "SwinAttention",
    "TokenMerging",
    "TokenPruning",
    "Transformer",
    "VectorQuantizer",
]
