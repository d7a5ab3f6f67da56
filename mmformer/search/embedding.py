"""From a trained model to vectors of an index: of the rows of a manifest, and of a query.

A model has one space that its modalities share if it has a head of their names, as a contrastive model has; without,
each modality has a space of its own, and so has what the fusion makes of whole samples. An index holds one space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from mmformer.datasets.dataset import ManifestDataset
from mmformer.datasets.manifest import Manifest
from mmformer.predict import Predictor
from mmformer.search.nearest import average
from mmformer.search.rows import ID, MODALITY

FUSED = "fused"
"""In place of a modality: the sample as a whole."""
SHARED = "shared"


def space(predictor: Predictor, modality: str) -> str:
    """The name of the space that vectors of a modality lie in.

    Raises:
        ValueError: the model does not read it, or has no fusion.
    """
    model = predictor.model
    if modality == FUSED:
        if model.fusion is None:
            raise ValueError(f"this model has no fusion: embed one of {', '.join(model.encoders)}")
        return FUSED
    if modality not in model.encoders:
        raise ValueError(f"no modality {modality!r}: this model has {', '.join(model.encoders)}")
    return SHARED if modality in model.heads else modality


def fingerprint(predictor: Predictor, modalities: Sequence[str]) -> str:
    """What tells vectors of one model and space from all others: a hash of the weights, and the space.

    Raises:
        ValueError: the modalities have no space in common.
    """
    spaces = {modality: space(predictor, modality) for modality in modalities}
    if len(set(spaces.values())) > 1:
        raise ValueError(
            f"vectors of {', '.join(spaces)} cannot be compared: this model has heads for "
            f"{', '.join(sorted(predictor.model.heads)) or 'none'}, and heads of their names give modalities one space"
        )
    digest = hashlib.sha256()
    for name, tensor in sorted(predictor.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{digest.hexdigest()[:16]}:{next(iter(spaces.values()))}"


def embed_rows(
    predictor: Predictor, path: Path | str, modality: str
) -> tuple[Float[Tensor, "N D"], pa.Table, list[str]]:
    """Vectors of the rows of a manifest that have a modality, their table, and a line for each that cannot be read.

    The table has the manifest's own columns of texts and numbers beside `id` and `modality`.

    Raises:
        ManifestError: the manifest has no such modality.
    """
    space(predictor, modality)
    manifest = predictor.manifest(path, labelled=False)
    wanted = [name for name in manifest.modalities if name in predictor.features] if modality == FUSED else [modality]
    manifest.require(*wanted)
    data = ManifestDataset(manifest, None, {name: predictor.features[name] for name in wanted}, cache_bytes=0)
    vectors, kept, faults = [], [], []
    for start in range(0, len(data), predictor.batch_size):
        chunk = range(start, min(start + predictor.batch_size, len(data)))
        batch = data.__getitems__([(0, i) for i in chunk])
        faults += [f"{f.id}: {f.column} {f.path}: {f.reason}" for f in batch.faults if f.column != "row"]
        if batch.inputs:
            found, present = _output(predictor, batch, modality)
            vectors.append(found[present])
            kept += [i for i, there in zip(batch.indices, present.tolist(), strict=True) if there]
    if not kept:
        raise ValueError(f"{path}: no row has a readable {modality}" + (f": {faults[0]}" if faults else ""))
    return torch.cat(vectors), _table(manifest, kept, modality), faults


def embed_query(predictor: Predictor, sample: Mapping[str, Any], fused: bool = False) -> Float[Tensor, " D"]:
    """The vector of a sample to search with: the mean direction of its modalities, or what the fusion makes of it."""
    if fused:
        return predictor.embed(sample)
    return average([predictor.embed({name: value}, name) for name, value in sample.items()])


def _output(predictor: Predictor, batch: Any, modality: str) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        encoded = predictor.model.encode(batch.to(predictor.device))
        if space(predictor, modality) == SHARED:
            vectors, present = predictor.model.output(encoded, modality, source=modality)
        else:
            vectors, present = predictor.model.summary(encoded, None if modality == FUSED else modality)
    return vectors.float().cpu(), present.bool().cpu()


def _table(manifest: Manifest, kept: Sequence[int], modality: str) -> pa.Table:
    """Ids, modality and the plain columns of some rows."""
    columns: dict[str, Any] = {ID: [manifest.id(i) for i in kept], MODALITY: [modality] * len(kept)}
    for name, column in manifest.table.columns.items():
        if name in columns or isinstance(column, list):
            continue
        kind = column.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_primitive(kind):
            columns[name] = column.take(pa.array(kept, pa.int64()))
    return pa.table(columns)
