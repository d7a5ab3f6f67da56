"""ViLT as transformers saves it: one Transformer over the words of a text and the patches of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmformer.checkpoints.changes import Change, Given, Rows, Tensors
from mmformer.checkpoints.families import bert, crossing, flava, parts, texts, towers
from mmformer.checkpoints.families.crossing import FIRST
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.towers import Layers, Pictures
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, rename

DEFAULTS: Config = flava.SHARED | {
    "vocab_size": 30522, "type_vocab_size": 2, "max_position_embeddings": 40, "image_size": 384, "patch_size": 32,
    "num_channels": 3, "max_image_length": -1,
}  # fmt: skip
"""What a config.json leaves out that says nothing else."""

SCORES = "mlm_score."
STREAM = ("text", "image")


@dataclass(frozen=True)
class Rowwise(Change):
    """A table of a few vectors, one for each target."""

    count: int

    verb = "split"

    def load(self, tensors: Given) -> Tensors:
        (table,) = tensors
        if table is None or table.ndim != 2 or len(table) != self.count:
            raise ValueError(f"{self.count} rows belong here")
        return table.unbind(0)

    def save(self, tensors: Tensors) -> Tensors:
        return (torch.stack(tensors),)


def matches(source: Source) -> bool:
    """`ViltModel`, or a model around it."""
    if source.config:
        return source.config.get("model_type") == "vilt"
    return source.has(f"{texts.prefix(source, 'vilt.')}embeddings.text_embeddings.word_embeddings.weight")


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that config.json describes; pictures may have any size, and `image_size` is that of its feature."""
    if not source.config:
        raise parts.lacks(source, "its config.json")
    config = DEFAULTS | source.config | {key: options[key] for key in ("max_image_length",) if key in options}
    texts.refuse(source, config, modality_type_vocab_size=2)
    pictures = towers.read_pictures(
        source,
        options,
        size=config["image_size"],
        patch=config["patch_size"],
        channels=config["num_channels"],
        colours=towers.HALF,
    )
    _refuse_a_draw(source, config, pictures)
    start = texts.prefix(source, "vilt.")
    layers, pooled = flava.layers(config), towers.outputs(source, f"{start}pooler.dense")
    pool = texts.sequence(FIRST, *flava.pooler(layers.dim)) if pooled else FIRST
    marks = {name: parts.part("mmformer.fusion.Mark", dim=layers.dim) for name in STREAM}
    fusion = crossing.fusion(layers.dim, STREAM, [], layers.stack(), pool, entrances=marks)
    return Described(
        model=parts.model(_encoders(config, layers, pictures), _heads(source, config, layers.dim), fusion=fusion),
        features=pictures.features(crop=False)
        | texts.features(config["max_position_embeddings"], begin=True, end=True),
        tokenizer=texts.tokenizer(source),
        layout={"prefix": start, "stored": bert.stored_scores(source, SCORES), **pictures.layout()},
        ignored=bert.unused_bias(source, SCORES),
    )


def _refuse_a_draw(source: Source, config: Config, pictures: Pictures) -> None:
    """Stop at a limit to the patches of a picture below what it has: transformers would draw some at random."""
    rows, columns = pictures.layout()["grid"]
    if 0 <= config["max_image_length"] < rows * columns:
        raise ValueError(
            f"{source.origin} draws {config['max_image_length']} of {rows * columns} patches at random, mmformer reads "
            "all: options={'max_image_length': -1} says that this is meant"
        )


def _encoders(config: Config, layers: Layers, pictures: Pictures) -> dict[str, Config]:
    """Both only embed: the layers are those of the fusion."""
    rows, columns = pictures.layout()["grid"]
    grid = parts.factory("mmformer.nn.StretchedGrid", rows=rows, columns=columns)
    norm = texts.built(layers.norm, normalized_shape=layers.dim)
    return {
        "text": parts.encoder(flava.words(config), [parts.part("mmformer.fusion.Mapped", part=norm)]),
        "image": parts.encoder(towers.embedder(layers.dim, pictures) | {"position": grid}, []),
    }


def _heads(source: Source, config: Config, dim: int) -> dict[str, Config]:
    """The heads that the file has: whether text and picture belong together, an answer or a class, hidden words."""
    heads = {}
    if width := towers.outputs(source, "rank_output"):
        heads["match"] = texts.linear(dim, width)
    if width := towers.outputs(source, "classifier"):
        heads["label"] = texts.linear(dim, width)
    if width := towers.outputs(source, "classifier.3"):
        inner = towers.outputs(source, "classifier.0") or 2 * dim
        norm, act = parts.part("torch.nn.LayerNorm", normalized_shape=inner), parts.part("torch.nn.GELU")
        heads["label"] = texts.sequence(texts.linear(dim, inner), norm, act, texts.linear(inner, width))
    if any(name.startswith(SCORES) for name in source.tensors):
        heads["vocabulary"] = bert.vocabulary(config, config["hidden_act"])
    return heads


def rules(described: Described) -> list[Rule]:
    """The table of ViLT in transformers."""
    start = described.layout["prefix"]
    embeddings, stack = f"{start}embeddings.", "fusion.transformer"
    patches, positions = f"{embeddings}patch_embeddings.projection", f"{embeddings}position_embeddings"
    kinds = tuple(f"fusion.entrances.{name}.kind" for name in STREAM)
    return [
        *crossing.embedding_rules(f"{embeddings}text_embeddings."),
        *rename(f"{embeddings}text_embeddings.LayerNorm", "encoders.text.stages.0.part"),
        towers.class_rule(f"{embeddings}cls_token"),
        *towers.embedder_rules(described, patches, positions, own=1, batched=True),
        Rule((f"{embeddings}token_type_embeddings.weight",), kinds, Rowwise(len(kinds))),
        *flava.layer_rules(f"{start}encoder.layer.{{i}}.", f"{stack}.layers.{{i}}"),
        *rename(f"{start}layernorm", f"{stack}.norm"),
        *rename(f"{start}pooler.dense", "fusion.pool.1"),
        *rename("rank_output", "heads.match"),
        *rename("classifier", "heads.label", Rows()),
        *rename("classifier.0", "heads.label.0"),
        *rename("classifier.1", "heads.label.1"),
        *rename("classifier.3", "heads.label.3", Rows()),
        *crossing.transform_rules(SCORES),
        *bert.score_rules(described, SCORES),
    ]


FAMILIES = (
    Family(
        name="vilt",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        options=(*towers.PICTURE_OPTIONS, "max_image_length"),
        ignored=bert.IGNORED,
    ),
)
