"""The plain config of a model, edited: the node of each part, layers of their own where a pattern made them."""

from __future__ import annotations

from copy import deepcopy
from pkgutil import resolve_name
from typing import Any

from torch import nn

from mmformer.nn import Block, Transformer

FEEDFORWARD = {"_target_": "mmformer.nn.FeedForward", "_partial_": True}
"""What a `Block` has where its config says nothing."""


def unrolled(config: Any) -> Any:
    """A copy of a config in which every Transformer names each of its layers, so that each can be changed alone."""
    if isinstance(config, list):
        return [unrolled(value) for value in config]
    if not isinstance(config, dict):
        return config
    made = {key: unrolled(value) for key, value in config.items()}
    if _makes(made, Transformer) and made.get("layers"):
        layers = made["layers"]
        made["layers"] = [deepcopy(layers[i % len(layers)]) for i in range(made["depth"])]
    if _makes(made, Block):
        made.setdefault("feedforward", dict(FEEDFORWARD))
    return made


def node(config: Any, path: str, module: nn.Module) -> dict[str, Any] | None:
    """The part of an unrolled config that makes the submodule of that path, and nothing else."""
    for name in path.split("."):
        if isinstance(config, list):
            config = config[int(name)] if name.isdigit() and int(name) < len(config) else None
        else:
            config = config.get(name) if isinstance(config, dict) else None
    return config if _makes(config, type(module)) else None


def _makes(config: Any, kind: type) -> bool:
    """Whether a node is of exactly this class: a subclass or a function would take other arguments."""
    return isinstance(config, dict) and "_target_" in config and resolve_name(config["_target_"]) is kind
