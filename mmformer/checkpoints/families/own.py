"""What mmformer saved itself: the folder of a model, a run, a checkpoint. Names stay as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmformer.checkpoints.changes import Copied, Same
from mmformer.checkpoints.folder import CONFIG, SUMS, TIED, exported, verify
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.store import RefusedFile
from mmformer.checkpoints.table import Described, Family, Rule

AVERAGE = "average.module."
MODEL, OBJECTIVES = "model.", "objectives."


def matches(source: Source) -> bool:
    """Tensors of a `Model` behind `model.`, as a run saves them."""
    return any(name.startswith("model.encoders.") for name in source.tensors)


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The config of the run; the averaged weights where a checkpoint has them."""
    config = source.config
    if SUMS in source.files and CONFIG in source.files:
        verify(source.files[CONFIG].parent)
    elif "config.yaml" in source.files:
        config = exported(_yaml(source.files["config.yaml"]))
    tied: dict[str, str] = json.loads(source.extra.get(TIED, "{}"))
    start = AVERAGE if any(name.startswith(AVERAGE) for name in source.tensors) else ""
    names = [name for name in source.tensors if name.startswith((start + MODEL, start + OBJECTIVES))]
    return Described(
        model=config.get("model") or {},
        objectives=config.get("objectives") or {},
        features=config.get("features") or {},
        tokenizer=source.files.get("tokenizer.json"),
        layout={
            "start": start,
            "origins": config.get("origins") or [],
            "compressed": config.get("compressed"),
            "names": {name: [copy for copy, kept in tied.items() if kept == name] for name in names},
        },
        ignored=dict.fromkeys((MODEL + "*", OBJECTIVES + "*"), "the checkpoint has an average of it") if start else {},
    )


def rules(described: Described) -> list[Rule]:
    """Every name as it is; a tensor that was tied is stored once."""

    def ours(name: str) -> str:
        return name.removeprefix(described.layout["start"]).removeprefix(MODEL)

    return [
        Rule((name,), (ours(name), *map(ours, copies)), Copied(1 + len(copies)) if copies else Same())
        for name, copies in described.layout["names"].items()
    ]


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RefusedFile(f"{path} is damaged: {error}") from error


FAMILIES = (
    Family(
        name="model",
        library="mmformer",
        matches=matches,
        describe=describe,
        rules=rules,
        ignored={
            "average.*": "belongs to the average of the weights",
            "objectives.*": "belongs to an objective",
            "teacher.*": "belongs to the teacher",
        },
        configured=(),
    ),
)
