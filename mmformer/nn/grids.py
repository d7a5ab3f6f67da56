"""Which grid each token was cut from, by its position: pictures and spectrograms, and lines of text or sound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmformer.tokens import Tokens

SPARE = 16
"""Grids may have so many times more cells than tokens."""


@dataclass(frozen=True, eq=False)
class Grids:
    """The grids that tokens stand on, on the host.

    Token i, at `where[i]` of the flattened (B T) sequence, stands at `row[i]` and `column[i]` of grid `grid[i]`, which
    is `height` x `width` (by grid). A text is a grid of one column. `owner` is, by grid, the segment of packed tokens
    or the row of padded ones. `position` is that of the tokens.
    """

    where: np.ndarray
    grid: np.ndarray
    row: np.ndarray
    column: np.ndarray
    height: np.ndarray
    width: np.ndarray
    owner: np.ndarray
    position: np.ndarray


def grids(tokens: Tokens) -> Grids:
    """Tokens by grid: neighbours of one modality and segment whose places run on, row by row.

    A row is a step in time or a row of a picture, a column is a column. A grid ends where a place comes that is not
    behind the last one, so a class token is a grid by itself; cells may be missing. Positions are copied to the host,
    so plan once a step (`planned`).

    Raises:
        ValueError: positions so far apart that their grids would have many times more cells than there are tokens.
    """
    segment = tokens.segment.flatten().cpu().numpy()
    where = np.flatnonzero(segment >= 0)
    position = tokens.position.flatten(0, 1).cpu().numpy()[where]
    modality = tokens.modality.flatten().cpu().numpy()[where]
    owner = segment[where] if tokens.layout is not None else where // tokens.segment.shape[1]
    row, column = position[:, 0] + position[:, 1], position[:, 2]
    behind = (row[1:] > row[:-1]) | ((row[1:] == row[:-1]) & (column[1:] > column[:-1]))
    same = (owner[1:] == owner[:-1]) & (modality[1:] == modality[:-1]) & (position[1:, 1] >= position[:-1, 1])
    starts = np.concatenate([np.zeros(min(1, len(where)), dtype=bool), ~(behind & same)])
    starts[:1] = True
    first = np.flatnonzero(starts)
    grid = starts.cumsum() - 1
    (row, height), (column, width) = (_extent(values, first, grid) for values in (row, column))
    if (height * width).sum() > SPARE * max(len(where), 1):
        raise ValueError(
            f"positions of {len(where)} tokens span grids of {(height * width).sum()} cells: this mixer needs tokens "
            "that stand next to each other; use mmformer.nn.Attention where most were left out"
        )
    return Grids(where, grid, row, column, height, width, owner[first], position)


def _extent(values: np.ndarray, first: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values from the smallest of their grid on, and how many there are in each grid."""
    if not len(first):
        return values, values
    values = values - np.minimum.reduceat(values, first)[grid]
    return values, np.maximum.reduceat(values, first) + 1
