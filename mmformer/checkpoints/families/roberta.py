"""RoBERTa and XLM-RoBERTa: BERT's encoder whose first positions belong to no place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.families import bert, parts, texts
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, rename

KINDS = ("roberta", "xlm-roberta", "camembert")


def matches(source: Source) -> bool:
    """A RoBERTa that transformers saved, with or without its head; without a config, one by its names."""
    if "model_type" in source.config:
        return source.config["model_type"] in KINDS
    return any(bert.has_layers(source, prefix) for prefix in ("", "roberta."))


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that `config.json` describes; places count from the one after `pad_token_id`."""
    config = texts.settings(source, options, *bert.SIZES)
    prefix, offset = texts.prefix(source, "roberta."), config.get("pad_token_id", 1) + 1
    heads = {"vocabulary": bert.vocabulary(config, "gelu")} if source.has("lm_head.dense.weight") else {}
    return Described(
        model=parts.model({"text": bert.encoder(source, config, prefix, offset)}, heads),
        features=texts.features(config["max_position_embeddings"] - offset, begin=True, end=True),
        tokenizer=texts.tokenizer(source),
        layout={"prefix": prefix, "stored": bert.stored_scores(source, "lm_head.")},
        ignored=bert.unused_bias(source, "lm_head."),
    )


def rules(described: Described) -> list[Rule]:
    """The table of transformers' RoBERTa."""
    return [
        *bert.encoder_rules(described.layout["prefix"]),
        *rename("lm_head.dense", "heads.vocabulary.transform.0"),
        *rename("lm_head.layer_norm", "heads.vocabulary.transform.2"),
        *bert.score_rules(described, "lm_head."),
    ]


FAMILIES = (
    Family(
        name="roberta",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        ignored=bert.IGNORED,
        options=(*bert.OPTIONS, "pad_token_id"),
    ),
)
