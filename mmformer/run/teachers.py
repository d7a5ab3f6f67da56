"""Trained runs as teachers of a run: opened, and compared with it before anything is learned from them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from mmformer.checkpoints import SavedModel, load_model
from mmformer.checkpoints.folder import SUMS
from mmformer.datasets.tokenizers import Tokenizer
from mmformer.model import Model
from mmformer.objectives import Teacher
from mmformer.predict import find_model


def open_teachers(
    objectives: Iterable[nn.Module], config: Mapping[str, Any], tokenizer: Tokenizer | None = None
) -> Iterator[str]:
    """Load the runs that teach, wherever in the objectives they are named; yields what to say of each.

    `config` is that of the run that learns, plain and resolved.

    Raises:
        FileNotFoundError: no such run.
        ValueError: a teacher that reads items or words otherwise, knows other classes, or whose answers are to be kept
            while samples are augmented.
    """
    for teacher in (part for objective in objectives for part in objective.modules() if isinstance(part, Teacher)):
        _check_cache(teacher, config)
        teacher.open(partial(_open, teacher, config, tokenizer))
        for run, model in zip(teacher.runs, teacher.models, strict=True):
            count = sum(p.numel() for p in model.parameters())
            yield f"teacher: {run}, {count / 1e6:.2f} M parameters, reads {', '.join(model.encoders)}"


def _open(teacher: Teacher, config: Mapping[str, Any], tokenizer: Tokenizer | None, run: str) -> tuple[Model, str]:
    folder = find_model(Path(run))
    saved = load_model(folder, teacher.allow)
    if wrong := [*_other_inputs(saved, config), *_other_words(saved, tokenizer), *_other_classes(saved, config)]:
        raise ValueError(f"the teacher {run} does not fit this run: {'; '.join(wrong)}")
    return saved.model, (folder / SUMS).read_text(encoding="utf-8")


def _check_cache(teacher: Teacher, config: Mapping[str, Any]) -> None:
    if teacher.cache is None or not config["data"].get("augment"):
        return
    seed = teacher.cache.seed
    if seed is None:
        raise ValueError(
            f"{teacher.cache.folder} would keep what teachers say of samples that augmentation changes each epoch: set "
            "data.augment=null, or the cache's seed=${seed} to keep each epoch of this seed apart"
        )
    if seed != config["seed"]:
        raise ValueError(f"the cache's seed is {seed}, but samples are augmented by seed={config['seed']}: give that")


def _other_inputs(saved: SavedModel, config: Mapping[str, Any]) -> Iterator[str]:
    """Where the run reads items otherwise than the teacher did."""
    for name, trained in saved.config["features"].items():
        here = config["data"]["features"].get(name)
        if here is None or name not in saved.model.encoders:
            continue
        mine, own = _whole(here), _whole(trained)
        for key in sorted({*mine, *own}):
            if mine.get(key) != own.get(key):
                yield f"data.features.{name}.{key} is {mine.get(key)}, it learned with {own.get(key)}"


def _whole(config: Any) -> Any:
    """A config of a part with the defaults of its signature, which it may leave out."""
    if not isinstance(config, Mapping):
        return config
    given = {key: _whole(value) for key, value in config.items()}
    if "_target_" not in config:
        return given
    parameters = inspect.signature(resolve_name(config["_target_"])).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | given


def _other_words(saved: SavedModel, tokenizer: Tokenizer | None) -> Iterator[str]:
    if saved.tokenizer is None or tokenizer is None or "text" not in saved.model.encoders:
        return
    with TemporaryDirectory() as folder:
        tokenizer.save(here := Path(folder) / "tokenizer.json")
        if here.read_bytes() != saved.tokenizer.read_bytes():
            yield (
                "it was trained on other words: take them, with data/tokenizer@data.tokenizer=pretrained "
                f"data.tokenizer.path={saved.tokenizer}"
            )


def _other_classes(saved: SavedModel, config: Mapping[str, Any]) -> Iterator[str]:
    theirs = saved.config["facts"].get("targets") or {}
    for name, target in (config["facts"].get("targets") or {}).items():
        if name in theirs and theirs[name].get("names") != target.get("names"):
            yield f"the classes of {name} are {target.get('names')}, its own {theirs[name].get('names')}"
