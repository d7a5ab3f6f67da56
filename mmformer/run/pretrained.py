"""Weights from elsewhere: `pretrained=PATH_OR_ID`, or `module.model.encoders.image.pretrained=PATH_OR_ID`.

A checkpoint of one's own fills the model that the config describes; one that was cut (`mmformer compress`) decides its
layers itself. One of another library decides the layers too, how raw items are read and how texts are cut into words;
the run's config decides everything else. What the checkpoint decides is written into the config before the data are
set up, so that the saved config opens without the checkpoint. How items are read (the size of a picture, the bands of a
sound) is said wherever it is not what the config had; what the command line names stands.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import OmegaConf, open_dict
from torch import nn

from mmformer.checkpoints.load import describe, fill, recognise
from mmformer.checkpoints.origin import remember
from mmformer.checkpoints.plan import Terms
from mmformer.checkpoints.preprocessing import preprocessing
from mmformer.checkpoints.report import MisfitError, Report
from mmformer.checkpoints.source import Source, open_source
from mmformer.checkpoints.table import Described, Family
from mmformer.run.launch import UserError

OWN = "mmformer"
TOKENIZER = "mmformer.datasets.pretrained.pretrained_tokenizer"


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A checkpoint, and what of a model it fills: all of it, or the encoder of one modality.

    `key` is how the user asked for it. `projected` encoders got a last stage that brings them to the run's width.
    `notes` say where the checkpoint reads items otherwise than the config did.
    """

    key: str
    source: Source
    family: Family
    described: Described
    modality: str | None = None
    projected: bool = False
    strict: bool = True
    notes: list[str] = field(default_factory=list)

    def load(self, model: nn.Module, objectives: Mapping[str, Any] | None = None) -> list[str]:
        """Fill a model, all of the checkpoint or nothing; gives back what to say of it.

        Of `objectives` those are filled too that a whole checkpoint has under the same name (the scale of CLIP's).

        Raises:
            UserError: tensors that are left over, each named.
        """
        part = self.modality and f"encoders.{self.modality}"
        try:
            shared = {name: made for name, made in (objectives or {}).items() if name in self.described.objectives}
            report = self._fill(model if part is None else model.get_submodule(part), part, {} if part else shared)
        except MisfitError as error:
            hint = "" if self.modality or not self.strict else " (pretrained_strict=false)"
            raise UserError(f"{self.key}: {error}{hint}") from error
        first = f"{self.key}: {self.family.library}/{self.family.name}, {report.summary()}"
        return [first, *self.notes, *report.details()]

    def _fill(self, module: nn.Module, part: str | None, objectives: Mapping[str, Any]) -> Report:
        rules, ignored, new = self.family.rules(self.described), {}, list(self.described.new)
        if self.projected:
            of_pool = [rule for rule in rules if any(name.startswith(f"{part}.pool.") for name in rule.targets)]
            rules = [rule for rule in rules if rule not in of_pool]
            ignored = {name: "pools tokens of another width" for rule in of_pool for name in rule.sources}
            new.append(f"{part}.stages.{len(self.encoder['stages'])}.*")
        elif part is None and self.family.library != OWN:
            new += [f"{name}.*" for name in _parts(module) if name not in _described_parts(self.described)]
        terms = Terms(
            ignored={**ignored, **self.described.ignored, **self.family.ignored},
            zeros=self.family.zeros,
            configured=self.family.configured,
            new=new,
            part=part,
        )
        return fill(module, self.source, rules, terms, objectives=objectives, strict=self.strict)

    def origins(self) -> list[dict[str, Any]]:
        """Where what it fills came from first, for the way back: see `mmformer.checkpoints.convert`."""
        part = self.modality and f"encoders.{self.modality}"
        if self.family.library != OWN:
            return [remember(self.source, self.family, self.described, part=part, projected=self.projected).plain()]
        saved = [] if self.projected else self.described.layout["origins"]
        if part is None:
            return saved
        return [{**origin, "parts": [part]} for origin in saved if part in origin["parts"]]

    @property
    def encoder(self) -> Mapping[str, Any]:
        assert self.modality is not None
        return self.described.model["encoders"][self.modality]


def adopt(config: Any, named: Sequence[str] = ()) -> list[Pretrained]:
    """The checkpoints that a config names, what they decide written into it; `config` is a DictConfig, and is changed.

    `named` are the dotted keys of the command line: how items are read stands where the user says it.

    Raises:
        UserError: a checkpoint that cannot be read, or that lacks what it was named for.
    """
    found = []
    if config.pretrained:
        found.append(_open("pretrained", str(config.pretrained), strict=config.pretrained_strict))
        if found[0].family.library == OWN:
            _compare_inputs(config, found[0])
            _write_words(config, found[0])
            _write_compressed(config, found[0])
        else:
            _write_model(config, found[0], named)
    for modality, encoder in list(config.module.model.encoders.items()):
        with open_dict(encoder):
            path = encoder.pop("pretrained", None)
        if path:
            key = f"module.model.encoders.{modality}.pretrained"
            found.append(_write_encoder(config, _open(key, str(path), modality=modality), named))
    if origins := [origin for checkpoint in found for origin in checkpoint.origins()]:
        with open_dict(config):
            config.origins = origins
    return found


def _open(key: str, path: str, **options: Any) -> Pretrained:
    try:
        source, family = recognise(open_source(path))
        described = describe(family, source, {})
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"{key}={path}: {error}") from error
    modality, has = options.get("modality"), described.model.get("encoders") or {}
    if modality and modality not in has:
        raise UserError(
            f"{key}={path}: this {family.library}/{family.name} has encoders of {', '.join(has) or 'nothing'}, "
            f"and none of {modality}"
        )
    return Pretrained(key=f"{key}={path}", source=source, family=family, described=described, **options)


def _write_model(config: Any, found: Pretrained, named: Sequence[str]) -> None:
    """The parts of the checkpoint in the place of the config's; those that it lacks stay."""
    model, described = config.module.model, found.described
    with open_dict(config):
        for kind in ("encoders", "heads"):
            model[kind] = {**(model.get(kind) or {}), **(described.model.get(kind) or {})}
        if described.model.get("fusion"):
            model.fusion = described.model["fusion"]
        for modality in described.model["encoders"]:
            _write_inputs(config, found, modality, named)


def _write_compressed(config: Any, found: Pretrained) -> None:
    """The layers of a model that was cut, which no choice of groups describes; any other fills those of the config."""
    if compressed := found.described.layout["compressed"]:
        with open_dict(config):
            config.module.model = dict(found.described.model)
            config.compressed = compressed
        found.notes.append("module.model: as it was cut")


def _write_encoder(config: Any, found: Pretrained, named: Sequence[str]) -> Pretrained:
    """The encoder in the place of the config's, with a projection where its width is another."""
    modality, encoder = str(found.modality), dict(found.encoder)
    width = _width(encoder)
    if width != config.dim:
        projection = {"_target_": "mmformer.encoders.Projection", "dim_in": width, "dim_out": config.dim}
        encoder |= {"stages": [*encoder["stages"], projection], "pool": None}
        found = replace(found, projected=True)
    with open_dict(config):
        config.module.model.encoders[modality] = encoder
        _write_inputs(config, found, modality, named)
    return found


def _write_inputs(config: Any, found: Pretrained, modality: str, named: Sequence[str]) -> None:
    """How the checkpoint reads items of a modality, and its words."""
    if feature := found.described.features.get(modality):
        place = f"data.features.{modality}"
        had = _plain(config.data.features.get(modality))
        said = {key.removeprefix(f"{place}.") for key in named if key.startswith(f"{place}.")}
        found.notes.extend(_differences(place, feature, had, said))
        config.data.features[modality] = {**feature, **{key: had[key] for key in had if key in said}}
    if modality == "text":
        _write_words(config, found)


def _compare_inputs(config: Any, found: Pretrained) -> None:
    """Say where the config reads items otherwise than the model of one's own that it is filled from."""
    for modality, feature in found.described.features.items():
        had = _plain(config.data.features.get(modality))
        if modality in config.module.model.encoders:
            found.notes.extend(_differences(f"data.features.{modality}", feature, had, had))


def _differences(place: str, trained: Mapping[str, Any], had: Mapping[str, Any], stands: Collection[str]) -> list[str]:
    """A line for each setting under which the checkpoint was trained and that is not what the config has."""
    lines = []
    for key in sorted({*trained, *had}):
        if trained.get(key) == had.get(key):
            continue
        old, new = had.get(key, "nothing"), trained.get(key, "nothing")
        lines.append(
            f"{place}.{key}: {old} stands, trained with {new}"
            if key in stands
            else f"{place}.{key}: {new}, as it was trained, where the config has {old}"
        )
    return lines


def _plain(node: Any) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=True) if node is not None else {}  # pyright: ignore


def _write_words(config: Any, found: Pretrained) -> None:
    """The words that a text encoder was trained on: ids of another tokenizer would mean something else.

    Raises:
        UserError: a checkpoint of another library without its tokenizer, and none that the config names.
    """
    path, options = found.described.tokenizer, {}
    if found.family.library != OWN:
        try:
            read = preprocessing(found.source.files, found.source.config)
        except ValueError as error:
            raise UserError(f"{found.key}: {error}") from error
        path = read.tokenizer or path
        if read.text:
            config.data.features.text = {**config.data.features.text, **read.text}
        if read.cleaning:
            options["cleaning"] = {"_target_": "mmformer.datasets.cleaning.Cleaning", "canonical": True}
    if path:
        config.data.tokenizer = {"_target_": TOKENIZER, "_partial_": True, "path": str(path), **options}
    elif found.family.library != OWN and config.data.tokenizer.get("_target_") != TOKENIZER:
        raise UserError(
            f"{found.key}: no tokenizer lies beside these weights: put its files there, or name them with "
            "data/tokenizer@data.tokenizer=pretrained data.tokenizer.path=..."
        )


def _width(encoder: Mapping[str, Any]) -> int:
    """Channels that come out of an encoder, as its config says."""
    last = [stage for stage in (encoder["embedder"], *encoder["stages"]) if {"dim", "dim_out"} & set(stage)][-1]
    return last.get("dim_out") or last["dim"]


def _parts(model: nn.Module) -> list[str]:
    """The encoders, the heads and the fusion of a model by name."""
    named = [f"{kind}.{name}" for kind in ("encoders", "heads") for name, _ in getattr(model, kind).named_children()]
    return [*named, "fusion"]


def _described_parts(described: Described) -> set[str]:
    model = described.model
    named = {f"{kind}.{name}" for kind in ("encoders", "heads") for name in model.get(kind) or {}}
    return named | ({"fusion"} if model.get("fusion") else set())
