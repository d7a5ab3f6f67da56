"""What travels with an exported model: what it takes and gives, and how raw samples become that."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mmformer import __version__
from mmformer.datasets.features import Feature, Picture, Text, Waveform
from mmformer.encoders import Encoder
from mmformer.fusion import View
from mmformer.model import Model
from mmformer.objectives import Classes, Labels, Number, Objective
from mmformer.runtime.description import FUSED, Description, Input, Kind, embedding_of
from mmformer.runtime.features import NAME, TOKENIZER, known

Size = tuple[int, int]
TRIED: tuple[Size, ...] = ((4096, 4096), (4096, 2048), (2048, 4096), (4096, 512), (512, 4096), (4096, 64), (64, 4096))
"""Sizes of pictures whose results tell what a rule makes of any."""


def describe(
    model: Model,
    features: Mapping[str, Feature],
    objective: Objective | None,
    labels: Sequence[str] = (),
    picture: Size | None = None,
    batch: int | None = None,
) -> Description:
    """What a program of all these features takes and gives: a prediction and what is fused, or embeddings.

    `picture` is the size of pictures where their rule bounds none. `batch` is the most samples of one call.

    Raises:
        ValueError: features or an objective that have no form without torch; the message names them.
    """
    inputs = tuple(_input(name, feature, model.encoders[name], picture) for name, feature in features.items())
    common: dict[str, Any] = {"inputs": inputs, "batch": batch, "mmformer": __version__}
    if objective is None:
        fused = [FUSED] if model.fusion is not None and len(features) > 1 else []
        return Description(outputs=tuple(map(embedding_of, [*fused, *features])), **common)
    kind = _kind(objective)
    source = getattr(objective, "source", None)
    reads = () if source is None else _modalities_of(model, source)
    output = "value" if kind == "Number" else "logits"
    fused = [embedding_of(FUSED)] if model.fusion is not None else []
    return Description(outputs=(output, *fused), kind=kind, labels=tuple(map(str, labels)), reads=reads, **common)


def _modalities_of(model: Model, source: str) -> tuple[str, ...]:
    """What a source is made of: itself, or what its view reads."""
    view = dict(model.views).get(source)
    return tuple(view.modalities) if isinstance(view, View) else (source,)


def plain(value: Any) -> Any:
    """A feature, a step or a tokenizer as data that JSON holds; other values as they are.

    Raises:
        ValueError: of a class that `mmformer.runtime` does not know.
    """
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if hasattr(value, "encode_batch"):
        return {TOKENIZER: _saved(value)}
    if not is_dataclass(value):
        return value
    name = type(value).__name__
    if name not in known():
        raise ValueError(f"{name} has no form that runs without torch: mmformer.runtime knows {', '.join(known())}")
    return {NAME: name} | {field.name: plain(getattr(value, field.name)) for field in fields(value)}


def _saved(tokenizer: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(path)
        return json.loads(path.read_text(encoding="utf-8"))


def _kind(objective: Objective) -> Kind:
    for kind in (Classes, Labels, Number):
        if isinstance(objective, kind):
            return kind.__name__  # pyright: ignore[reportReturnType]
    raise ValueError(
        f"{type(objective).__name__} gives neither label nor number: export one encoder (--encoder NAME) to embed with"
    )


def _input(name: str, feature: Feature, encoder: nn.Module, picture: Size | None) -> Input:
    """What a program takes of one modality."""
    embedder: Any = encoder.embedder if isinstance(encoder, Encoder) else None
    least, largest = _bounds(name, feature, picture)
    fixed = least == largest
    is_picture = isinstance(feature, Picture)
    multiple = 1 if is_picture else getattr(feature, "multiple", 1)
    shortest = max(least[0], _reach(embedder))
    ragged = not fixed and getattr(embedder, "local", True)
    # torch.export takes an axis of length 1 for one that always is
    tensor = max(-(-shortest // multiple), 2 if ragged else 1) * multiple
    trailing = [getattr(feature, field) for field in ("channels", "num_mels") if hasattr(feature, field)]
    return Input(
        name=name,
        dtype="int64" if isinstance(feature, Text) else "uint8" if is_picture else "float32",
        shape=(*(largest if is_picture or fixed or largest[0] <= tensor else (0,)), *trailing),
        largest=(*largest, *trailing),
        shortest=shortest,
        least=tensor,
        axes=len(largest),
        multiple=multiple,
        ragged=ragged,
        feature=plain(feature),
    )


def _bounds(name: str, feature: Feature, picture: Size | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the smallest and the largest item of a feature, without its channels."""
    if isinstance(feature, Text):
        return (feature.max_length if feature.pad else 1,), (feature.max_length,)
    if isinstance(feature, Picture):
        shapes = [feature.shape(np.zeros(size, np.uint8)) for size in TRIED]
        least, largest = (tuple(map(pick, zip(*shapes, strict=True))) for pick in (min, max))
        if picture is not None:
            return (least if largest == picture else (1, 1)), picture
        if max(shapes[-1]) > max(shapes[3]):  # the longer, the larger
            raise ValueError(
                f"{name}: pictures of any length keep their aspect, and a program takes those of one size: "
                "say which (--picture HEIGHTxWIDTH), or give the feature a `longest`"
            )
        return least, largest
    waveform = feature if isinstance(feature, Waveform) else getattr(feature, "waveform", None)
    if not isinstance(waveform, Waveform):
        raise ValueError(f"{name} is read by {type(feature).__name__}, which has no form that runs without torch")
    rate = waveform.sample_rate
    lengths = (1, int(waveform.max_seconds * rate))
    least, largest = (feature.shape((np.zeros(length, np.float32), rate)) for length in lengths)
    return least, largest


def _reach(embedder: Any) -> int:
    """The shortest item that gives a token."""
    stem = getattr(embedder, "stem", None)
    steps = getattr(stem, "steps", None)
    return steps[0][1] if steps else getattr(stem, "reach", 1)
