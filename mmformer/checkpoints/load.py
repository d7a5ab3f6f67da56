"""Load a checkpoint of the field: find its family, build what it describes, fill it and account for every tensor.

loaded = load("path/to/vit")             # a file, a folder, org/name of a hub, wandb:entity/project/name:alias
print(loaded.report)
encoder = load("path/to/clip", part="encoders.image").model
report = load_into(my_model.encoders["image"], "path/to/clip", part="encoders.image", new=["*.position.*"])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmformer.checkpoints.build import build
from mmformer.checkpoints.origin import Origin, remember
from mmformer.checkpoints.plan import Terms, plan
from mmformer.checkpoints.report import LOADED, MisfitError, Report
from mmformer.checkpoints.source import Source, open_source
from mmformer.checkpoints.table import Described, Family, Rule
from mmformer.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model, or a part of one, in evaluation mode, with the account of its tensors.

    `config` is the plain config that built `model`; `described` is that of the whole checkpoint. `objectives` are those
    that the file holds tensors of (the temperature of CLIP), for a whole model. With `origin` among the `origins` of a
    saved model's config, `convert` finds the way back.
    """

    model: nn.Module
    objectives: dict[str, Objective]
    report: Report
    config: dict[str, Any]
    described: Described
    family: Family
    origin: Origin


def load(
    path_or_id: str | Path | Source,
    *,
    part: str | None = None,
    options: Mapping[str, Any] | None = None,
    family: str | None = None,
    strict: bool = True,
    resize: bool = True,
) -> Loaded:
    """Rebuild the model of a checkpoint, or one `part` of it ("encoders.image"), with its weights.

    `options` say what the file does not, and what is to be different from it (image_size); `family` is needed where
    several fit. Without `strict` what does not fit stays as initialised, and is listed.

    Raises:
        MisfitError: tensors that are missing, unexpected or of another shape; its `report` has all of them.
        ValueError: no family knows this file, or its config leaves something open.
        RefusedFile: a file that could run code or that is damaged.
    """
    source, found = recognise(_source(path_or_id), family)
    described = describe(found, source, options or {})
    config = _part_config(described.model, part, source.origin)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and then overwritten
        model = build(config, origin=source.origin)
        asked = {} if part else described.objectives
        objectives = {name: build(objective, origin=source.origin) for name, objective in asked.items()}
    terms = _terms(found, described, part, resize)
    report = fill(model, source, found.rules(described), terms, objectives=objectives, strict=strict)
    for made in (model, *objectives.values()):
        made.eval()
    return Loaded(
        model=model,
        objectives=objectives,
        report=report,
        config=config,
        described=described,
        family=found,
        origin=remember(source, found, described, options, part),
    )


def load_into(
    module: nn.Module,
    path_or_id: str | Path | Source,
    *,
    part: str | None = None,
    options: Mapping[str, Any] | None = None,
    family: str | None = None,
    strict: bool = True,
    resize: bool = True,
    new: Sequence[str] = (),
    ignore: Sequence[str] = (),
    objectives: Mapping[str, Objective] | None = None,
) -> Report:
    """Fill a module of one's own with the weights of a checkpoint, or of that `part` of it which the module is.

    Tensors of another size are resized where the family's table says how. Targets that match a pattern of `new`
    ("heads.*") stay as they are, tensors of the file that match one of `ignore` are left out. Names are those of the
    whole model. `objectives` are filled too, where the file has tensors for them. Errors as in `load`, and then the
    module is as it was.
    """
    source, found = recognise(_source(path_or_id), family)
    described = describe(found, source, options or {})
    terms = _terms(found, described, part, resize)
    ignored = {**dict.fromkeys(ignore, "left out as asked"), **terms.ignored}
    terms = replace(terms, new=(*terms.new, *new), ignored=ignored)
    return fill(module, source, found.rules(described), terms, objectives=objectives, strict=strict)


def fill(
    module: nn.Module,
    source: Source,
    rules: Iterable[Rule],
    terms: Terms,
    *,
    objectives: Mapping[str, Objective] | None = None,
    strict: bool = True,
) -> Report:
    """Copy the tensors of a source into a module and its objectives by a key table, all of them or none.

    Names of the rules are those of the described model; where `terms.part` is set, `module` is that part of it.

    Raises:
        MisfitError: with `strict` anything unaccounted for; without it, nothing that fits at all.
    """
    targets = named_tensors(module, terms.part)
    for name, objective in (objectives or {}).items():
        targets |= named_tensors(objective, f"objectives.{name}")
    planned = plan(source.origin, source.tensors, targets, rules, terms)
    report = planned.report
    if strict and not report.ok:
        advice = "Nothing was loaded. Choose another family or config for it, or load what fits with strict=false"
        raise MisfitError(report, advice)
    if not report.of(*LOADED):
        raise MisfitError(report, "Nothing was loaded: no tensor of it fits")
    planned.carry_out(source.tensors, targets)
    return report


def recognise(source: Source, name: str | None = None) -> tuple[Source, Family]:
    """The family whose layout the file has, and the source as that family names its tensors.

    `name` chooses among several: "vit" or "timm/vit".

    Raises:
        ValueError: no family fits, or several.
    """
    from mmformer.checkpoints.families import FAMILIES

    choice = [family for family in FAMILIES if name in (None, family.name, f"{family.library}/{family.name}")]
    known = ", ".join(sorted(f"{family.library}/{family.name}" for family in FAMILIES))
    if not choice:
        raise ValueError(f"no family {name!r}: there are {known}")
    candidates = _unwrapped(source)
    for candidate in candidates:
        found = [family for family in choice if family.matches(candidate)]
        if len(found) == 1:
            return candidate, found[0]
        if found:
            fitting = ", ".join(f"{family.library}/{family.name}" for family in found)
            raise ValueError(f"{source.origin} could be {fitting}: choose with family=")
    if name is not None and len(choice) == 1:
        return source, choice[0]  # what does not fit is named tensor by tensor
    first = ", ".join(f"{n} {source.tensors.shape(n)}" for n in list(source.tensors)[:5])
    raise ValueError(
        f"{source.origin} is of no family that mmformer knows ({known}); its {len(source.tensors)} tensors start "
        f"with {first}. If it is one of these in another layout, choose with family="
    )


def describe(family: Family, source: Source, options: Mapping[str, Any]) -> Described:
    """What a family reads off a source; options that it does not know are an error that names those it does."""
    if unknown := sorted(set(options) - set(family.options)):
        known = ", ".join(family.options) or "none"
        raise ValueError(f"options {', '.join(unknown)}: {family.library}/{family.name} takes {known}")
    return family.describe(source, options)


def named_tensors(module: nn.Module, part: str | None = None) -> dict[str, Tensor]:
    """The parameters and saved buffers of a module by name, tied ones under each name, behind the name of its part."""
    prefix = f"{part}." if part else ""
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict(keep_vars=True).items()}


def _source(path_or_id: str | Path | Source) -> Source:
    return path_or_id if isinstance(path_or_id, Source) else open_source(path_or_id)


def _unwrapped(source: Source) -> list[Source]:
    """The source, and the one inside `model.` where that wraps it all: some families write it, some wrappers add it."""
    if not all(name.startswith("model.") for name in source.tensors):
        return [source]
    return [source, replace(source, tensors=source.tensors.without_prefix("model."))]


def _terms(family: Family, described: Described, part: str | None, resize: bool) -> Terms:
    return Terms(
        ignored={**described.ignored, **family.ignored},
        zeros=family.zeros,
        configured=family.configured,
        new=described.new,
        resize=resize,
        part=part,
    )


def _part_config(model: dict[str, Any], part: str | None, origin: str) -> dict[str, Any]:
    if not model:
        raise ValueError(f"{origin} comes without a config: give the folder that has one, or load it into a model")
    config: Any = model
    for step in part.split(".") if part else ():
        if not isinstance(config, dict) or not isinstance(config.get(step), dict):
            parts = [f"{a}.{b}" for a in ("encoders", "heads") for b in model.get(a) or {}]
            parts += ["fusion"] * bool(model.get("fusion"))
            raise ValueError(f"{origin} has no part {part!r}: it has {', '.join(parts)}")
        config = config[step]
    return config
