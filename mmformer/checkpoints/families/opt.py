"""OPT: a causal Transformer with ReLU, alone or behind the queries of BLIP-2.

Its places are counted over the whole sequence, whatever stands in it, so they enter at the Transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.changes import Rows
from mmformer.checkpoints.families import parts, texts
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.texts import SCORES, STACK, TABLE
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, join, rename

SIZES = ("hidden_size", "ffn_dim", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "vocab_size")
OFFSET = 2
"""Positions in front of the table that belong to no place."""


def matches(source: Source) -> bool:
    """An OPT that transformers saved, with or without its head."""
    return source.config.get("model_type") == "opt"


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that `config.json` describes."""
    config = texts.settings(source, options, *SIZES)
    dim, tied = config["hidden_size"], config.get("tie_word_embeddings", True)
    pool = parts.part("mmformer.pooling.LastPool")
    encoder = parts.encoder(embedder(config), [stack(source, config)], pool)
    return Described(
        model=parts.model({"text": encoder}, texts.scores(source, dim, config["vocab_size"], tied)),
        features=texts.features(config["max_position_embeddings"], begin=True),
        tokenizer=texts.tokenizer(source),
        layout={
            "prefix": texts.prefix(source, "model.decoder.", "decoder."),
            "stored": texts.stored(source, "lm_head.weight"),
        },
    )


def embedder(config: Config) -> Config:
    """Words to tokens."""
    return parts.part("mmformer.encoders.TextEmbedder", dim=config["hidden_size"], vocab_size=config["vocab_size"])


def stack(source: Source, config: Config) -> Config:
    """The Transformer.

    Raises:
        ValueError: words of fewer channels than the layers, or norms behind the branches, as the 350M model has.
    """
    dim, bias = config["hidden_size"], config.get("enable_bias", True)
    texts.refuse(
        source, config, do_layer_norm_before=True, _remove_final_layer_norm=False, layer_norm_elementwise_affine=True
    )
    if (width := config.get("word_embed_proj_dim") or dim) != dim:
        raise ValueError(f"{source.origin} has words of {width} channels and layers of {dim}, which mmformer has equal")
    layer = parts.block(
        attention=parts.attention(config["num_attention_heads"], bias=bias),
        feedforward=parts.feedforward(dim, config["ffn_dim"], config.get("activation_function", "relu"), bias=bias),
        norm=parts.layer_norm(1e-5),
    )
    places = config["max_position_embeddings"] + OFFSET
    return parts.transformer(
        dim,
        config["num_hidden_layers"],
        [layer],
        visibility=texts.visibility(causal=True),
        norm=parts.layer_norm(1e-5),
        position=parts.factory("mmformer.nn.Learned", num_positions=places, offset=OFFSET),
    )


def rules(described: Described) -> list[Rule]:
    """The table of transformers' OPT."""
    scores = texts.if_stored(described, "lm_head.weight", f"{SCORES}.weight")
    return [*decoder_rules(described.layout["prefix"], STACK), *scores]


def decoder_rules(prefix: str, ours: str) -> list[Rule]:
    """The table of words, places and layers, which may lie inside another model."""
    theirs, layer = prefix + "layers.{i}.", ours + ".layers.{i}"
    return [
        Rule((f"{prefix}embed_tokens.weight",), (TABLE,), Rows()),
        Rule((f"{prefix}embed_positions.weight",), (f"{ours}.position.table.weight",), Rows()),
        *join([f"{theirs}self_attn.{name}_proj" for name in "qkv"], f"{layer}.attention.qkv"),
        *rename(f"{theirs}self_attn.out_proj", f"{layer}.attention.out"),
        *rename(f"{theirs}self_attn_layer_norm", f"{layer}.attention_norm"),
        *rename(f"{theirs}fc1", f"{layer}.feedforward.up"),
        *rename(f"{theirs}fc2", f"{layer}.feedforward.down"),
        *rename(f"{theirs}final_layer_norm", f"{layer}.feedforward_norm"),
        *rename(f"{prefix}final_layer_norm", f"{ours}.norm"),
    ]


FAMILIES = (
    Family(
        name="opt",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        options=(*SIZES, "activation_function", "tie_word_embeddings"),
    ),
)
