"""Plain configs of our parts, as the descriptions of all families write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmformer.checkpoints.source import Source

Config = dict[str, Any]

ACTIVATIONS: dict[str, Config] = {
    "gelu": {"_target_": "torch.nn.GELU"},
    "gelu_new": {"_target_": "torch.nn.GELU", "approximate": "tanh"},
    "gelu_pytorch_tanh": {"_target_": "torch.nn.GELU", "approximate": "tanh"},
    "gelu_fast": {"_target_": "torch.nn.GELU", "approximate": "tanh"},
    "quick_gelu": {"_target_": "mmformer.nn.QuickGELU"},
    "relu": {"_target_": "torch.nn.ReLU"},
    "silu": {"_target_": "torch.nn.SiLU"},
    "swish": {"_target_": "torch.nn.SiLU"},
    "tanh": {"_target_": "torch.nn.Tanh"},
}
"""Non-linearities by the names that configs of transformers give them."""


def part(target: str, **options: Any) -> Config:
    """A part to build at once: `part("mmformer.heads.Head", dim=8, num_outputs=2)`."""
    return {"_target_": target, **options}


def factory(target: str, **options: Any) -> Config:
    """A factory that its owner calls: with `dim`, where it is a layer, a norm or a position."""
    return {"_target_": target, "_partial_": True, **options}


def activation(name: str) -> Config:
    """The factory of a non-linearity.

    Raises:
        ValueError: a name that no family of mmformer uses.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"the config asks for the activation {name!r}: mmformer has {', '.join(sorted(ACTIVATIONS))}")
    return {**ACTIVATIONS[name], "_partial_": True}


def layer_norm(eps: float) -> Config:
    """The factory of a LayerNorm."""
    return factory("torch.nn.LayerNorm", eps=eps)


def attention(num_heads: int, **options: Any) -> Config:
    """The factory of self-attention; options as in `mmformer.nn.Attention`."""
    return factory("mmformer.nn.Attention", num_heads=num_heads, **options)


def cross_attention(num_heads: int, **options: Any) -> Config:
    """The factory of cross-attention; options as in `mmformer.nn.CrossAttention`."""
    return factory("mmformer.nn.CrossAttention", num_heads=num_heads, **options)


def feedforward(dim: int, hidden: int, act: str, **options: Any) -> Config:
    """The factory of a feed-forward map with `hidden` channels; options as in `mmformer.nn.FeedForward`."""
    return factory("mmformer.nn.FeedForward", expansion=hidden / dim, activation=activation(act), **options)


def block(**parts: Any) -> Config:
    """The factory of a layer; parts as in `mmformer.nn.Block`."""
    return factory("mmformer.nn.Block", **parts)


def transformer(dim: int, depth: int, layers: Sequence[Config], **options: Any) -> Config:
    """A stack of layers; options as in `mmformer.nn.Transformer`."""
    return part("mmformer.nn.Transformer", dim=dim, depth=depth, layers=list(layers), **options)


def encoder(embedder: Config, stages: Sequence[Config], pool: Config | None = None) -> Config:
    """An encoder; `pool` as in `mmformer.encoders.Encoder`."""
    return part("mmformer.encoders.Encoder", embedder=embedder, stages=list(stages), pool=pool)


def model(encoders: Mapping[str, Config], heads: Mapping[str, Config] | None = None, **fusion: Any) -> Config:
    """A whole model; `fusion=` its fusion where it has one."""
    return part("mmformer.model.Model", encoders=dict(encoders), heads=dict(heads or {}), **fusion)


def pixels(source: Source, mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pictures on the scale 0 to 1, from preprocessor_config.json where there is one."""
    found = source.json("preprocessor_config.json")
    return list(found.get("image_mean") or mean), list(found.get("image_std") or std)


def lacks(source: Source, name: str) -> ValueError:
    """The error for something that neither the checkpoint nor the options say."""
    return ValueError(f"{source.origin} does not say {name}: give options={{{name!r}: ...}}")
