"""Masked modelling: what is hidden, and how far a guess is off.

What is drawn is drawn on the host, so that it is the same on every device and its number is known there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor


def hide_words(
    ids: Int[Tensor, " n"],
    mask: int,
    vocab_size: int,
    special: Sequence[int],
    share: float = 0.15,
    generator: Generator | None = None,
) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """The ids with some hidden, and which are to be guessed: a `share` of them (BERT, arXiv 1810.04805, 3.1).

    Of these, 80 % become `mask`, 10 % any other word and 10 % stay. `special` ids are never chosen, and never put in.
    """
    device = ids.device
    reserved = torch.tensor(sorted({mask, *special}), device=device)
    draws, which = torch.rand(2, len(ids), generator=generator).to(device).unbind()
    chosen = (draws < share) & ~torch.isin(ids, reserved)
    words = torch.tensor([i for i in range(vocab_size) if i not in {mask, *special}])
    other = words[torch.randint(len(words), (len(ids),), generator=generator)].to(device)
    shown = torch.where(which < 0.8, mask, torch.where(which < 0.9, other, ids))
    return torch.where(chosen, shown, ids), chosen


@runtime_checkable
class Choice(Protocol):
    """Draws which cells of a grid are hidden, true for hidden; some cell always stays."""

    def __call__(self, rows: int, columns: int, generator: Generator | None) -> Bool[Tensor, "rows columns"]: ...


@dataclass(frozen=True)
class Scattered:
    """A `share` of the cells, each on its own (MAE, arXiv 2111.06377, hides 0.75)."""

    share: float

    def __call__(self, rows: int, columns: int, generator: Generator | None) -> Bool[Tensor, "rows columns"]:
        count = _number(self.share, rows * columns)
        order = torch.rand(rows * columns, generator=generator).argsort()
        return (order.argsort() < count).view(rows, columns)


@dataclass(frozen=True)
class Blocks:
    """Rectangles of `least` cells or more until a `share` is hidden (BEiT, arXiv 2106.08254, algorithm 1).

    BEiT and FLAVA hide 0.4 of 14 x 14 patches, in rectangles of 16 and more, of ratios between 0.3 and 1 / 0.3.
    """

    share: float
    least: int
    ratio: float = 0.3

    def __call__(self, rows: int, columns: int, generator: Generator | None) -> Bool[Tensor, "rows columns"]:
        wanted = _number(self.share, rows * columns)
        hidden = torch.zeros(rows, columns, dtype=torch.bool)
        while (lacking := wanted - int(hidden.sum())) > 0:
            size, ratio, down, across = torch.rand(4, generator=generator).tolist()
            area = min(self.least, lacking) + size * max(0, lacking - self.least)
            ratio = exp(log(self.ratio) * (1 - 2 * ratio))
            height = min(rows, max(1, round(sqrt(area * ratio))))
            width = min(columns, max(1, round(sqrt(area / ratio))))
            top, left = int(down * (rows - height + 1)), int(across * (columns - width + 1))
            fresh = (~hidden[top : top + height, left : left + width]).nonzero()[:lacking]
            hidden[top + fresh[:, 0], left + fresh[:, 1]] = True
        return hidden


def _number(share: float, count: int) -> int:
    """How many of `count` cells are hidden: one at least if there are several, and never all."""
    return min(max(1, round(share * count)), count - 1)


def patches(planes: Float[Tensor, "n h w C"], rows: int, columns: int) -> Float[Tensor, "n t P"]:
    """The values of each cell of a grid over planes, row by row.

    Raises:
        ValueError: planes that do not divide into such a grid.
    """
    n, height, width, channels = planes.shape
    if height % rows or width % columns:
        raise ValueError(f"{height} x {width} values do not divide into {rows} x {columns} cells: hide other items")
    cells = planes.reshape(n, rows, height // rows, columns, width // columns, channels).permute(0, 1, 3, 2, 4, 5)
    return cells.reshape(n, rows * columns, -1)


def standardized(cells: Float[Tensor, "*n P"]) -> Float[Tensor, "*n P"]:
    """Each cell with mean 0 and variance 1, so that its texture counts and not its brightness (MAE's norm_pix)."""
    mean, variance = cells.mean(-1, keepdim=True), cells.var(-1, keepdim=True)
    return (cells - mean) / (variance + 1e-6).sqrt()


def pixel_losses(guess: Float[Tensor, "n P"], cells: Float[Tensor, "n P"]) -> Float[Tensor, " n"]:
    """The mean squared error of each cell."""
    return (guess.float() - cells.float()).square().mean(-1)


def code_losses(logits: Float[Tensor, "n V"], codes: Int[Tensor, "n Q"], sizes: Sequence[int]) -> Float[Tensor, " n"]:
    """The cross-entropy of each cell, a mean over its Q codes; the logits of the codebooks lie side by side.

    Raises:
        ValueError: logits that are not as many as the codebooks have codes.
    """
    if logits.shape[1] != sum(sizes):
        raise ValueError(f"{logits.shape[1]} logits for codebooks of {list(sizes)} codes: give the head {sum(sizes)}")
    parts = logits.float().split(list(sizes), 1)
    return torch.stack(
        [F.cross_entropy(part, ids, reduction="none") for part, ids in zip(parts, codes.T, strict=True)]
    ).mean(0)
