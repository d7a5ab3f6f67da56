"""What the descriptions of AST, Whisper and wav2vec 2.0 share: how recordings are read, and their classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.families import parts, texts, towers
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.vit import LABEL, label_rules
from mmformer.checkpoints.preprocessing import Preprocessing, preprocessing
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Rule, rename

AUDIO = "encoders.audio"
RATE = 16_000
"""Samples a second that all these models were trained with."""


def read(source: Source, config: Config) -> Preprocessing:
    """What the files of the processor say of recordings."""
    names = ("preprocessor_config.json", "processor_config.json")
    return preprocessing({name: source.files[name] for name in names if name in source.files}, config)


def waveform(**options: Any) -> Config:
    """The feature that reads a recording; options as in `mmformer.datasets.features.Waveform`."""
    return parts.part("mmformer.datasets.features.Waveform", sample_rate=RATE, **options)


def classifier(source: Source, options: Mapping[str, Any], dim: int) -> dict[str, Config]:
    """The classes of a recording from the mean of its tokens, behind a projection where the file has one.

    `num_classes` asks for other classes, from the tokens themselves.
    """
    if "num_classes" in options:
        return {"label": texts.linear(dim, options["num_classes"])}
    hidden, classes = towers.outputs(source, "projector"), towers.outputs(source, "classifier")
    if hidden is None or classes is None:
        return {}
    return {"label": texts.sequence(texts.linear(dim, hidden), texts.linear(hidden, classes))}


def classifier_rules(described: Described) -> list[Rule]:
    """The table of such a classifier."""
    return label_rules(described, *rename("projector", f"{LABEL}.0"), *rename("classifier", f"{LABEL}.1"))
