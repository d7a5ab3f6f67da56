"""A config that stands alone: with the architecture of every wrapped backbone, without the files it began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def standalone(config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The config of `model` with each wrapped backbone described in full and its `weights` taken out.

    Weights go with the model; what they were first read from may be gone when it is opened again.

    Raises:
        ValueError: weights at a place of the config where the model has no wrapped backbone to describe them.
    """
    return _part(config, model, "")


def _part(config: Any, model: nn.Module, place: str) -> Any:
    if isinstance(config, list | tuple):
        return [_part(value, model, f"{place}.{i}".lstrip(".")) for i, value in enumerate(config)]
    if not isinstance(config, Mapping):
        return config
    out = {name: _part(value, model, f"{place}.{name}".lstrip(".")) for name, value in config.items()}
    if str(out.get("_target_", "")).startswith(__package__ or "") and "weights" in out:
        return out | _described(model, place, out["weights"]) | {"weights": None}
    return out


def _described(model: nn.Module, place: str, weights: str | None) -> dict[str, Any]:
    """The arguments that build the module at a place of the config, which is its place in the model too."""
    try:
        module: Any = model.get_submodule(place)
        return dict(module.described)
    except AttributeError as error:
        if weights is None:
            return {}
        raise ValueError(
            f"{place} came from the weights {weights!r}, and the model has no wrapped backbone there: "
            "give its architecture in the config, with weights null"
        ) from error
