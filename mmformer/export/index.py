"""An index of `mmformer index` as a table for the device."""

from __future__ import annotations

from pathlib import Path

import torch

from mmformer.predict import Predictor
from mmformer.runtime import Table
from mmformer.search import Index
from mmformer.search.embedding import fingerprint


def to_table(index: Index, predictor: Predictor, modality: str, half: bool = True) -> Table:
    """The vectors and rows of an index that queries of a modality can search; `half` keeps 16 bits of each number.

    Raises:
        ValueError: the index is of another model, or of a space that the modality is not in.
    """
    model = fingerprint(predictor, [modality])
    if model != index.model:
        raise ValueError(
            f"the index holds vectors of the model {index.model}, and {modality} of this run is in {model}: "
            "index with this run"
        )
    vectors = torch.cat([part.vectors for part in index.parts]).float().numpy()
    return Table.of(index.rows.to_pylist(), vectors, half)


def write_table(index: Path, predictor: Predictor, modality: str, path: Path) -> Path:
    """Read an index and write it as one file. Raises as `Index.load` and `to_table`."""
    return to_table(Index.load(index), predictor, modality).save(path)
