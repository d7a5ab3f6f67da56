"""Plain configs of picture and text towers read back into sizes: the inverse of `towers`.

What is read here is checked afterwards, as the files written from it are described anew; a config of another kind
lacks a key, or has a value that stands for something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmformer.checkpoints.families import parts
from mmformer.checkpoints.families.towers import Layers, Pair

NAMES = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "tanh")
"""Non-linearities by the names that other libraries know."""

Plain = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cells:
    """How an encoder cuts pictures; mean and standard deviation are those of colours on the scale 0 to 1."""

    grid: Pair
    patch: Pair
    channels: int
    tokens: int
    bias: bool
    mean: list[float]
    std: list[float]

    @property
    def size(self) -> int | list[int]:
        """Height and width in pixels, one number for a square."""
        height, width = (cells * side for cells, side in zip(self.grid, self.patch, strict=True))
        return height if height == width else [height, width]

    @property
    def side(self) -> int | list[int]:
        """Height and width of a patch, one number for a square."""
        return self.patch[0] if self.patch[0] == self.patch[1] else list(self.patch)

    def layout(self) -> dict[str, Any]:
        """What tables of rules must know."""
        return {"patch": self.patch, "grid": self.grid}

    def fits(self, size: Any) -> bool:
        """Whether pictures of a config's size have this grid: a border of less than a patch is left out."""
        pair = (size, size) if isinstance(size, int) else size
        return tuple(side // patch for side, patch in zip(pair, self.patch, strict=True)) == self.grid


def cells(encoder: Plain) -> Cells:
    """How an encoder cuts pictures into patches."""
    embedder = encoder["embedder"]
    stem, normalize, position = embedder["stem"], embedder["normalize"], embedder["position"]
    height, width = stem["size"]
    tokens = embedder.get("class_tokens")
    mean, std = ([round(value / 255, 12) for value in normalize[name]] for name in ("mean", "std"))
    channels = stem["channels"]
    return Cells(
        grid=(position["rows"], position["columns"]),
        patch=(height, width),
        channels=channels,
        tokens=tokens["count"] if tokens else 0,
        bias=stem["bias"],
        mean=mean * channels if len(mean) == 1 else mean,
        std=std * channels if len(std) == 1 else std,
    )


def layers(encoder: Plain) -> Layers:
    """The layers of an encoder whose one stage is a Transformer of equal layers."""
    stack = encoder["stages"][0]
    layer = stack["layers"][0]
    attention, feedforward = layer["attention"], layer["feedforward"]
    scaled = "part" in attention
    if scaled:
        attention, feedforward = attention["part"], feedforward["part"]
    return Layers(
        dim=stack["dim"],
        depth=stack["depth"],
        heads=attention["num_heads"],
        hidden=round(stack["dim"] * feedforward["expansion"]),
        act=activation(feedforward["activation"]),
        eps=layer["norm"]["eps"],
        qkv_bias=attention.get("bias", True) is True,
        scaled=scaled,
    )


def entry(encoder: Plain) -> bool:
    """Whether a norm stands in front of the layers."""
    return encoder["stages"][0].get("entry_norm") is not None


def activation(factory: Plain) -> str:
    """The name of a non-linearity.

    Raises:
        ValueError: one that has none.
    """
    plain = {key: value for key, value in factory.items() if key != "_partial_"}
    found = next((name for name in NAMES if parts.ACTIVATIONS[name] == plain), None)
    if found is None:
        raise ValueError(f"the activation {plain.get('_target_')} has no name in other libraries")
    return found


def outputs(head: Plain) -> int | None:
    """How many outputs a head has, if it is a linear map or one that embeds for comparison."""
    return head.get("out_features") or head.get("num_outputs")


def ratio(hidden: int, dim: int) -> float:
    """The share that libraries multiply `dim` by, and cut off behind the point, to have `hidden` channels."""
    found = hidden / dim
    return found if int(dim * found) == hidden else math.nextafter(found, math.inf)


def refuse(what: str, **wrong: bool) -> None:
    """Stop at what a family cannot hold.

    Raises:
        ValueError: one of `wrong` holds; underscores of its name are spaces.
    """
    if found := [name.replace("_", " ") for name, holds in wrong.items() if holds]:
        raise ValueError(f"{what} has no {', '.join(found)}")
