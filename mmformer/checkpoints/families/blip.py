"""BLIP as transformers and as Salesforce's own code save it: a BERT that looks at pictures, as encoder and as decoder.

Encoder and decoder have different weights but for those that training ties, so each use of a file is one model; the
option `task` chooses where a file holds several.

    retrieval   does a text fit a picture: the text encoder, alone for cosines and beside the picture to judge a pair
    caption     the text decoder, causal, beside the picture
    answer      the text encoder reads the question beside the picture, and the decoder the answer beside the question

The original puts an id of its own in the place of a text's first: [ENC] before a pair is judged, [DEC] to decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmformer.checkpoints.families import bert, clip, crossing, parts, salesforce, texts, towers, vit_timm
from mmformer.checkpoints.families.crossing import FIRST, LAST, Bert
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.salesforce import Tower
from mmformer.checkpoints.families.towers import IMAGE, IMAGE_LAYER
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, rename

ENCODER, DECODER, SCORES = "text_encoder.", "text_decoder.bert.", "text_decoder.cls.predictions."
DEFAULTS: dict[str, Config] = {
    "vision": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 384, "patch_size": 16, "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    },
    "text": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 8,
        "vocab_size": 30524, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    },
}  # fmt: skip
"""What a config.json leaves out that says nothing else."""

LEFT = {
    "retrieval": ("text_decoder.*",),
    "caption": ("text_encoder.*", "itm_head.*", "vision_proj.*", "text_proj.*"),
    "answer": ("itm_head.*", "vision_proj.*", "text_proj.*"),
}
"""What a file may hold beside a task."""


def matches(source: Source) -> bool:
    """`BlipForImageTextRetrieval`, `BlipForConditionalGeneration` or `BlipForQuestionAnswering`."""
    known = source.has("vision_model.embeddings.class_embedding") and _has_text(source)
    return known and source.config.get("model_type", "blip") == "blip"


def matches_original(source: Source) -> bool:
    """A file of Salesforce's code, by its names: all layers of the text look at the picture."""
    return source.has("visual_encoder.blocks.0.attn.qkv.weight") and _has_text(source) and not _has_types(source)


def _has_text(source: Source) -> bool:
    names = (f"{start}encoder.layer.0.crossattention.self.query.weight" for start in (ENCODER, DECODER))
    return any(map(source.has, names))


def _has_types(source: Source) -> bool:
    return any(source.has(f"{start}embeddings.token_type_embeddings.weight") for start in (ENCODER, DECODER))


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model of a task that config.json describes."""
    if not source.config:
        raise parts.lacks(source, "its config.json")
    tower = vision(source, options, DEFAULTS["vision"])
    config = DEFAULTS["text"] | (source.config.get("text_config") or {})
    sizes = Bert(
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        act=config["hidden_act"],
        eps=config["layer_norm_eps"],
        vocab_size=config["vocab_size"],
        length=config["max_position_embeddings"],
        context_dim=tower.dim,
    )
    tied = bool(config.get("tie_word_embeddings", True))
    return _described(source, options, tower, _Reader(source, sizes=sizes, tied=tied), {"original": False})


def describe_original(source: Source, options: Mapping[str, Any]) -> Described:
    """The model of a task that the tensors describe."""
    tower = salesforce.tower(source, options, towers.OPENAI)
    return _described(source, options, tower, _Reader(source, heads=options.get("text_heads")), {"original": True})


def vision(source: Source, options: Mapping[str, Any], defaults: Config) -> Tower:
    """The encoder of pictures by the config of transformers, for BLIP and BLIP-2."""
    config = defaults | (source.config.get("vision_config") or {})
    layers = clip.tower_layers(config)
    pictures = towers.read_pictures(
        source,
        options,
        size=config["image_size"],
        patch=config["patch_size"],
        channels=config["num_channels"],
        colours=towers.OPENAI,
    )
    return Tower(parts.encoder(towers.embedder(layers.dim, pictures), [layers.stack()], FIRST), layers.dim, pictures)


@dataclass(frozen=True)
class _Reader:
    """Where the sizes of encoder and decoder come from: one config for both, or the tensors of each."""

    source: Source
    sizes: Bert | None = None
    heads: int | None = None
    tied: bool = True

    def at(self, start: str) -> Bert:
        return self.sizes or crossing.sizes(self.source, start, self.heads)


def _described(
    source: Source, options: Mapping[str, Any], tower: Tower, reader: _Reader, layout: dict[str, Any]
) -> Described:
    task = _task(source, options)
    build = {"retrieval": _retrieval, "caption": _caption, "answer": _answer}[task]
    model = build(source, tower, reader)
    features = {
        name: texts.features(encoder["embedder"]["position"]["num_positions"], begin=True, end=True)["text"]
        for name, encoder in model["encoders"].items()
        if name != "image"
    }
    pictures = salesforce.layout(tower.pictures) if layout["original"] else tower.pictures.layout()
    return Described(
        model=model,
        objectives=salesforce.contrastive(source) if task == "retrieval" else {},
        features=tower.pictures.features(crop=False) | features,
        tokenizer=texts.tokenizer(source),
        layout={"task": task, "stored": bert.stored_scores(source, SCORES), **pictures, **layout},
        ignored={
            **dict.fromkeys(LEFT[task], f"is for another task than {task}, which options={{'task': ...}} chooses"),
            **bert.unused_bias(source, SCORES),
        },
    )


def _task(source: Source, options: Mapping[str, Any]) -> str:
    """What the file is used for, where `options` do not say: what its own class computes.

    Raises:
        ValueError: no such task, or one that the file has no tensors for.
    """
    held = {name: any(key.startswith(name) for key in source.tensors) for name in (ENCODER, DECODER, "itm_head.")}
    possible = {
        "retrieval": held[ENCODER],
        "caption": held[DECODER],
        "answer": held[ENCODER] and held[DECODER],
    }
    usual = "answer" if possible["answer"] and not held["itm_head."] else "retrieval" if held[ENCODER] else "caption"
    task = options.get("task", usual)
    if not possible.get(task):
        able = ", ".join(name for name, can in possible.items() if can)
        raise ValueError(f"{source.origin} has no tensors for the task {task!r}: it has those for {able}")
    return task


def _retrieval(source: Source, tower: Tower, reader: _Reader) -> Config:
    text = reader.at(ENCODER)
    stack = text.stack(text.depth, text.layer(crosses=True))
    heads = {
        name: towers.unit_head(dim, width, bias=True)
        for name, dim, theirs in (("image", tower.dim, "vision_proj"), ("text", text.dim, "text_proj"))
        if (width := towers.outputs(source, theirs))
    }
    if width := towers.outputs(source, "itm_head"):
        heads["match"] = texts.linear(text.dim, width)
    return parts.model(
        {"image": tower.encoder, "text": text.encoder()},
        heads,
        fusion=crossing.fusion(text.dim, ["text"], ["image"], stack, FIRST),
        views={"text": crossing.view("text", FIRST)},
    )


def _caption(source: Source, tower: Tower, reader: _Reader) -> Config:
    text = reader.at(DECODER)
    return parts.model(
        {"image": tower.encoder, "text": text.encoder()},
        {"vocabulary": text.vocabulary(tied=reader.tied)},
        fusion=decoder(text, "text", "image"),
    )


def _answer(source: Source, tower: Tower, reader: _Reader) -> Config:
    question, answer = reader.at(ENCODER), reader.at(DECODER)
    stack = question.stack(question.depth, question.layer(crosses=True))
    return parts.model(
        {"image": tower.encoder, "text": question.encoder(), "answer": answer.encoder("answer")},
        {"vocabulary": answer.vocabulary("answer", tied=reader.tied)},
        fusion=crossing.cascade(
            {"text": crossing.fusion(question.dim, ["text"], ["image"], stack, FIRST)},
            decoder(answer, "answer", "text"),
        ),
    )


def decoder(text: Bert, modality: str, context: str) -> Config:
    """The fusion of a decoder: the tokens of `modality` see those before them, and all of `context`."""
    stack = text.stack(text.depth, text.layer(crosses=True), causal=True)
    return crossing.fusion(text.dim, [modality], [context], stack, LAST)


def rules(described: Described) -> list[Rule]:
    """The table of BLIP in transformers."""
    return [*vision_rules(described), *_text_rules(described)]


def rules_original(described: Described) -> list[Rule]:
    """The table of BLIP in its own code."""
    return [*vit_timm.rules(described, salesforce.VISUAL), *_text_rules(described), salesforce.TEMPERATURE]


def vision_rules(described: Described) -> list[Rule]:
    """The table of the encoder of pictures in transformers, for BLIP and BLIP-2."""
    embeddings, theirs = "vision_model.embeddings.", "vision_model.encoder.layers.{i}."
    patches, positions = f"{embeddings}patch_embedding", f"{embeddings}position_embedding"
    return [
        towers.class_rule(f"{embeddings}class_embedding"),
        *towers.embedder_rules(described, patches, positions, own=1, batched=True),
        *rename(f"{theirs}self_attn.qkv", f"{IMAGE_LAYER}.attention.qkv"),
        *towers.layer_rules(
            IMAGE_LAYER, theirs, "layer_norm1", "self_attn.projection", "layer_norm2", "mlp.fc1", "mlp.fc2"
        ),
        *rename("vision_model.post_layernorm", f"{IMAGE}.stages.0.norm"),
    ]


def _text_rules(described: Described) -> list[Rule]:
    task = described.layout["task"]
    if task == "retrieval":
        return [
            *crossing.text_rules(ENCODER, "fusion.transformer"),
            *rename("vision_proj", "heads.image.out"),
            *rename("text_proj", "heads.text.out"),
            *rename("itm_head", "heads.match"),
        ]
    scores = [*crossing.transform_rules(SCORES), *bert.score_rules(described, SCORES)]
    if task == "caption":
        return [*crossing.text_rules(DECODER, "fusion.transformer"), *scores]
    return [
        *crossing.text_rules(ENCODER, "fusion.earlier.text.transformer"),
        *crossing.text_rules(DECODER, "fusion.last.transformer", "answer"),
        *scores,
    ]


FAMILIES = (
    Family(
        name="blip",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        ignored=bert.IGNORED,
        options=(*towers.PICTURE_OPTIONS, "task"),
    ),
    Family(
        name="blip",
        library="salesforce",
        matches=matches_original,
        describe=describe_original,
        rules=rules_original,
        ignored=salesforce.IGNORED,
        zeros=(clip.BIAS,),
        options=(*salesforce.OPTIONS, "task"),
    ),
)
