"""The way back: a trained model, or one encoder of it, as a folder that another library opens by its own loader.

What is written is read again before it gets its name: by our own loader, which must find the same config and the same
numbers in it, and by the library itself where it is installed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmformer.checkpoints.folder import SavedModel, load_model, replacing
from mmformer.checkpoints.libraries import LIBRARIES, Library, try_to_open
from mmformer.checkpoints.load import load, named_tensors
from mmformer.checkpoints.origin import Origin
from mmformer.checkpoints.plan import original
from mmformer.checkpoints.table import Described, Family, Written

EPSILON = 1e-5
"""By how much norms may differ in what they add to a variance, where `near` is enough."""

SHOWN = 5
KINDS = ("encoders", "heads", "objectives")
PROJECTION = "mmformer.encoders.Projection"

Plain = Mapping[str, Any]


class CannotConvert(ValueError):
    """A model that the library has no place for, or not for all of it."""


@dataclass(frozen=True)
class Converted:
    """What was written: the folder, the family ("timm/vit"), how its library opens it, and what to know of it."""

    folder: Path
    family: str
    how: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """What is converted: the config and the tensors of some parts of a model, and where they came from."""

    names: tuple[str, ...]
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    origin: Origin | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Way:
    """Where to, and how strictly."""

    library: Library
    output: Path
    near: bool
    check: bool


def convert(
    model: Path | str,
    library: str,
    output: Path | str,
    *,
    part: str | None = None,
    near: bool = False,
    check: bool = True,
) -> Converted:
    """Write a saved model for `library`: "transformers", "timm" or "open_clip".

    `model` is the folder that `save_model` wrote; `part` is one encoder of it ("encoders.image"). With `near` norms may
    get another epsilon, as timm has one for all models of a name. With `check` the library opens the result, if it is
    installed.

    Raises:
        CannotConvert: something that the library's classes cannot hold, by name; nothing is written then.
        FileExistsError: `output` is there already.
    """
    chosen = next((known for known in LIBRARIES if known.name == library), None)
    if chosen is None:
        raise ValueError(f"no way to {library!r}: there are {', '.join(known.name for known in LIBRARIES)}")
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} is there already: give another folder, or remove it")
    saved = load_model(model)
    held = _held(saved, part)
    reasons = []
    for family in _families(held.origin, library):
        try:
            return _convert(saved, held, family, _Way(chosen, output, near, check))
        except CannotConvert as error:
            reasons.append(str(error))
    raise CannotConvert(f"{model} cannot become a model of {library}: {'; '.join(reasons)}")


def targets(family: Family) -> list[str]:
    """The libraries that models of a family can be written for, its own first; empty for one that has no way out."""
    from mmformer.checkpoints.families import FAMILIES

    names = [known.name for known in LIBRARIES]
    own = [family.library] if family.library in names else []
    kin = {"deit": "vit"}.get(family.name, family.name)
    return own + [f.library for f in FAMILIES if f.write and f.name == kin and f.library not in (family.library, "")]


def _families(origin: Origin | None, library: str) -> list[Family]:
    """The families of a library to try: that of the origin, or those that write models of any origin."""
    from mmformer.checkpoints.families import FAMILIES

    there = [family for family in FAMILIES if family.library == library]
    if origin and (found := [family for family in there if _name(family) == origin.family]):
        return found
    return [family for family in there if family.write]


def _held(saved: SavedModel, part: str | None) -> Part:
    """The parts to convert: the one that is asked for, or all that came from one checkpoint."""
    config = json.loads(json.dumps(saved.config))
    kinds = {**config["model"], "objectives": config.get("objectives") or {}}
    there = [f"{kind}.{name}" for kind in KINDS for name in kinds.get(kind) or {}] + ["fusion"] * bool(
        kinds.get("fusion")
    )
    origin = _origin(config, there, part)
    names = (part,) if part else tuple(name for name in (origin.parts if origin else there) if name in there)
    left = [name for name in there if name not in names and part is None]
    notes = (f"left out, as the checkpoint had no such part: {', '.join(left)}",) if left else ()
    restricted: dict[str, Any] = {
        kind: {name: inner for name, inner in (kinds.get(kind) or {}).items() if f"{kind}.{name}" in names}
        for kind in KINDS
    }
    restricted["fusion"] = kinds.get("fusion") if "fusion" in names else None
    held = Part(names, restricted, _tensors(saved.model, saved.objectives, names), origin, notes)
    return _without_projection(held) if origin and origin.projected else held


def _origin(config: Plain, there: list[str], part: str | None) -> Origin | None:
    """The checkpoint that the parts came from, if they came from one."""
    origins = [Origin.of(origin) for origin in config.get("origins") or []]
    encoders = [name for name in there if name.startswith("encoders.")]
    if part is not None and part not in encoders:
        raise ValueError(f"no part {part!r} to convert: this model has {', '.join(encoders)}")
    if part is None and len(origins) > 1:
        choice = ", ".join(encoders)
        raise ValueError(f"this model came from {len(origins)} checkpoints: choose one encoder, part={choice}")
    return next((origin for origin in origins if part is None or part in origin.parts), None)


def _tensors(
    model: nn.Module, objectives: Mapping[str, nn.Module], names: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """The tensors of a model and its objectives as rules name them, or those of the parts with these `names`."""
    found = named_tensors(model)
    for name, objective in objectives.items():
        found |= named_tensors(objective, f"objectives.{name}")
    return {n: t for n, t in found.items() if names is None or any(n.startswith(f"{part}.") for part in names)}


def _without_projection(held: Part) -> Part:
    """An encoder as it left its checkpoint, before a map that brings it to the width of the run."""
    ((name, encoder),) = held.config["encoders"].items()
    last = len(encoder["stages"]) - 1
    if last < 0 or encoder["stages"][last]["_target_"] != PROJECTION:
        return held
    stage = f"encoders.{name}.stages.{last}"
    config = {**held.config, "encoders": {name: {**encoder, "stages": encoder["stages"][:last]}}}
    tensors = {key: tensor for key, tensor in held.tensors.items() if not key.startswith(f"{stage}.")}
    note = f"left out: {stage}, which brings the encoder to the width of this model; what is written ends before it"
    return replace(held, config=config, tensors=tensors, notes=(*held.notes, note))


def _convert(saved: SavedModel, held: Part, family: Family, way: _Way) -> Converted:
    """Write, read again, compare, and only then give the folder its name."""
    library, written = way.library, _written(held, family)
    made = _original(held, family, written)
    written = replace(written, config=_typed(written.config, made, library))
    with replacing(way.output) as folder:
        save_file(made, folder / library.weights, {"format": "pt"})
        for name, content in {**written.files, library.config: written.config}.items():
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if saved.tokenizer is not None and held.config["encoders"].get("text"):
            shutil.copy(saved.tokenizer, folder / "tokenizer.json")
        notes = _compare(held, family, folder, way.near)
        how = ""
        if way.check:
            try:
                how, note = try_to_open(library, folder, written.config, made)
            except ValueError as error:
                raise CannotConvert(f"{_name(family)}: {error}") from error
            notes += [note] if note else []
    return Converted(way.output, _name(family), how.format(folder=way.output), (*held.notes, *notes))


def _written(held: Part, family: Family) -> Written:
    """The config of the family, from that of the model, and from the origin's where it is the same family."""
    origin = held.origin if held.origin and held.origin.family == _name(family) else None
    if family.write is not None:
        try:
            return family.write(held.config, origin and origin.written)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            lacks = f"its config has no {error}" if isinstance(error, KeyError) else str(error)
            raise CannotConvert(f"{_name(family)}: {lacks}") from error
    assert origin is not None, "only families that write, or that of the origin, are tried"
    written = origin.written
    config, options = written.config, {"num_classes": "num_labels"}
    if held.names != origin.parts:
        config = {k: v for k, v in config.items() if k != "architectures"}
        tower = {"encoders.image": "vision_config", "encoders.text": "text_config"}.get(held.names[0], "")
        config = config[tower] if len(held.names) == 1 and config.get(tower) else config
    return replace(written, config=config | {options.get(k, k): v for k, v in origin.options.items()})


def _original(held: Part, family: Family, written: Written) -> dict[str, Tensor]:
    """The tensors by the family's names, each with memory of its own."""
    described = Described(model=held.config, objectives=held.config["objectives"], layout=written.layout)
    try:
        made = original(held.tensors, family.rules(described))
    except (ValueError, RuntimeError) as error:
        raise CannotConvert(f"{_name(family)}: {error}") from error
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in made.items()}


def _typed(config: dict[str, Any], made: Mapping[str, Tensor], library: Library) -> dict[str, Any]:
    """transformers casts what it reads to the type that the config says: it must be the one that was written."""
    if library.name != "transformers":
        return config
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in made.values() if tensor.is_floating_point()}
    plain = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    return plain | {"dtype": types.pop()} if len(types) == 1 else plain


def _compare(held: Part, family: Family, folder: Path, near: bool) -> list[str]:
    """Read the folder as any checkpoint and find the same model in it; gives back what differs and may.

    Raises:
        CannotConvert: another model, or other numbers.
    """
    try:
        again = load(folder, family=_name(family))
    except ValueError as error:
        raise CannotConvert(f"{_name(family)}: {error}") from error
    wrong, notes = _other_parts(held, json.loads(json.dumps(again.config)), near)
    found = _tensors(again.model, again.objectives)
    wrong += [f"{name} has no place there" for name in held.tensors if name not in found]
    for name, ours in held.tensors.items():
        if name in found and not _equal(name, ours, found[name], family):
            wrong.append(f"{name} would have other numbers there")
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise CannotConvert(f"{_name(family)}: {'; '.join(wrong[:SHOWN])}{more}")
    return notes


def _other_parts(held: Part, config: Plain, near: bool) -> tuple[list[str], list[str]]:
    """Where the config that was found differs from ours: what must not, and what may as `near` allows it."""
    wrong, notes = [], []
    ours = {
        kind: part for kind, part in held.config.items() if kind != "objectives"
    }  # losses, of which nothing is kept
    for path, here, there in _differences(ours, {kind: config.get(kind) for kind in ours}):
        if path.endswith(".pool") and here is None and held.origin and held.origin.projected:
            continue  # it would read another width
        text = f"{path} is {_short(here)} here, {_short(there)} there"
        if path.endswith(".eps") and isinstance(here, float) and abs(here - there) <= EPSILON:
            (notes if near else wrong).append(text if near else f"{text} (--near accepts that)")
        else:
            wrong.append(text)
    return wrong, notes


def _equal(name: str, ours: Tensor, theirs: Tensor, family: Family) -> bool:
    if any(fnmatchcase(name, pattern) for pattern in family.configured):
        return torch.allclose(ours, theirs, rtol=1e-6)
    return torch.equal(ours, theirs)


def _differences(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The places where two plain configs differ; a key that is missing counts as null, an empty mapping too."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in dict.fromkeys([*ours, *theirs]):
            yield from _differences(ours.get(key), theirs.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for place, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(*pair, f"{path}.{place}")
    elif (ours or None) != (theirs or None) and not _same_number(ours, theirs):
        yield path, ours, theirs


def _same_number(ours: Any, theirs: Any) -> bool:
    numbers = isinstance(ours, int | float) and isinstance(theirs, int | float)
    return numbers and not isinstance(ours, bool) and abs(ours - theirs) <= 1e-9 * abs(ours)


def _short(value: Any) -> str:
    text = value["_target_"] if isinstance(value, Mapping) and "_target_" in value else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _name(family: Family) -> str:
    return f"{family.library}/{family.name}"
