"""What all wrapped backbones share: their outputs as features, and features as packed tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.encoders.encoder import packed
from mmformer.nn.position import AXES
from mmformer.tokens import Layout, Tokens

PREFIXES = (
    "cls_token", "class_token", "class_embedding", "distillation_token", "dist_token", "reg_token", "register_tokens",
)  # fmt: skip
"""What the libraries call the learned vectors that stand in front of the patches."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a backbone gives for n items of one shape, or padded to one; of item i the first `lengths[i]` places count.

    `position` is the same for all items and lies on the host.
    """

    x: Float[Tensor, "n t D"]
    position: Int[Tensor, "t 3"]
    lengths: Sequence[int]


class Wrapper(nn.Module, ABC):
    """Raw items of one modality through a backbone of another library to packed tokens of `dim` channels.

    A linear map follows where the backbone's `width` is another. A backbone that is frozen whole works as in
    evaluation: no dropout, and running statistics stand still. `described` holds the arguments of the constructor that
    build the same backbone without any file.
    """

    backbone: Any  # its methods are the other library's

    def __init__(self, backbone: nn.Module, width: int, dim: int, modality: str, described: dict[str, Any]):
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Linear(width, dim) if width != dim else nn.Identity()
        self.width, self.modality, self.described = width, modality, described

    @abstractmethod
    def features(self, items: Ragged) -> Iterable[Features]:
        """The backbone's outputs for the items, in their order."""

    def forward(self, items: Ragged, num_samples: int) -> Tokens:
        """Packed tokens of the items.

        Raises:
            ValueError: the backbone gives another number of channels than its `width`.
        """
        set_mode(self.backbone, self.training)
        try:
            found = list(self.features(items))
        except Exception as error:
            shapes = f"{min(items.shapes)} to {max(items.shapes)}" if items.shapes else "no shape"
            error.add_note(f"while {type(self.backbone).__name__} read {len(items)} {self.modality} items, {shapes}")
            raise
        tokens = to_tokens(found, items, num_samples, self.modality)
        if tokens.x.shape[-1] != self.width:
            raise ValueError(
                f"{type(self.backbone).__name__} gives {tokens.x.shape[-1]} channels and not {self.width}: "
                "give the right number as `width`"
            )
        return tokens.with_x(self.projection(tokens.x))


def set_mode(backbone: nn.Module, training: bool) -> None:
    """Training or evaluation mode; a backbone without a trainable parameter is always in the latter."""
    wanted = training and any(parameter.requires_grad for parameter in backbone.parameters())
    if backbone.training != wanted:
        backbone.train(wanted)


def to_tokens(features: Sequence[Features], items: Ragged, num_samples: int, modality: str) -> Tokens:
    """Packed tokens of the items, a segment each."""
    x, position, lengths = [], [], []
    for part in features:
        count, width = part.x.shape[:2]
        kept = np.concatenate([np.arange(length) + i * width for i, length in enumerate(part.lengths)])
        flat = part.x.flatten(0, 1)
        whole = len(kept) == count * width
        x.append(flat if whole else flat.index_select(0, torch.from_numpy(kept).to(flat.device, non_blocking=True)))
        position.append(part.position[torch.from_numpy(kept % width)])
        lengths += part.lengths
    joined = torch.cat(x)
    place = torch.cat(position).to(joined.device, non_blocking=True)
    return packed(joined, place, modality, Layout(items.rows, tuple(lengths), num_samples, items.places))


def time_features(x: Float[Tensor, "n t D"], lengths: Sequence[int] | None = None) -> Features:
    """A sequence that runs through time."""
    count, width = x.shape[:2]
    return Features(x=x, position=grid_positions(width, 1, ("time", "column")), lengths=lengths or [width] * count)


def picture_features(x: Tensor, height: int, width: int, num_prefix: int) -> Features:
    """Features of pictures of `height` x `width`, from a map (n, D, rows, columns) or a sequence (n, t, D).

    Raises:
        ValueError: a sequence whose length is no grid of square patches behind `num_prefix` further tokens.
    """
    if x.ndim == 4:
        rows, columns = x.shape[2:]
        x, num_prefix = x.flatten(2).transpose(1, 2), 0
    else:
        rows, columns = square_grid(height, width, x.shape[1] - num_prefix)
    position = grid_positions(rows, columns, ("row", "column"), num_prefix)
    return Features(x=x, position=position, lengths=[x.shape[1]] * x.shape[0])


def grid_positions(rows: int, columns: int, axes: tuple[str, str], num_prefix: int = 0) -> Int[Tensor, "t 3"]:
    """Positions of a grid, row by row, on the two named axes; `num_prefix` tokens at position 0 stand in front."""
    place = torch.zeros(rows, columns, 3, dtype=torch.long)
    place[..., AXES[axes[0]]] = torch.arange(rows)[:, None]
    place[..., AXES[axes[1]]] += torch.arange(columns)
    return torch.cat([place.new_zeros(num_prefix, 3), place.flatten(0, 1)])


def square_grid(height: int, width: int, count: int) -> tuple[int, int]:
    """Rows and columns of `count` square patches of a picture, whose side nobody says.

    The number of patches falls as their side grows, so at most one grid has that number.

    Raises:
        ValueError: no side gives so many patches.
    """
    for rounded in (lambda side, patch: side // patch, lambda side, patch: -(-side // patch)):
        for patch in range(1, min(height, width) + 1):
            rows, columns = rounded(height, patch), rounded(width, patch)
            if rows * columns == count:
                return rows, columns
    raise ValueError(
        f"{count} tokens are no grid of square patches of a picture of {height} x {width}: "
        "say how many of the backbone's tokens stand in front of the patches (num_prefix)"
    )


def count_prefix(backbone: nn.Module) -> int:
    """How many class, distillation and register tokens a backbone puts in front of its patches."""
    found = [p for name, p in backbone.named_parameters() if name.rpartition(".")[2] in PREFIXES]
    return sum(parameter.shape[-2] if parameter.ndim > 1 else 1 for parameter in found)
