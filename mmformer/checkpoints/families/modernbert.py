"""ModernBERT: an encoder with rotary positions and gated maps, most of whose layers see a window only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.changes import Rows
from mmformer.checkpoints.families import parts, texts
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.texts import LAYER, SCORES, STACK, TABLE
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, rename

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


def matches(source: Source) -> bool:
    """A ModernBERT that transformers saved, with or without its head."""
    return source.config.get("model_type") == "modernbert"


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that `config.json` describes."""
    config = texts.settings(source, options, *SIZES)
    dim, norm = config["hidden_size"], layer_norm(config)
    kinds = layer_types(config)
    # The embeddings' norm does for the first attention, which has none of its own.
    norms = [{"attention": parts.factory("torch.nn.Identity"), "feedforward": norm}, *[norm] * (len(kinds) - 1)]
    layers = [layer(source, config, *pair) for pair in zip(kinds, norms, strict=True)]
    embedder = parts.part("mmformer.encoders.TextEmbedder", dim=dim, vocab_size=config["vocab_size"])
    stack = parts.transformer(dim, len(layers), texts.repeating(layers), norm=norm, entry_norm=norm)
    heads = {"vocabulary": vocabulary(config)} if source.has("head.dense.weight") else {}
    return Described(
        model=parts.model({"text": parts.encoder(embedder, [stack])}, heads),
        features=texts.features(config.get("max_position_embeddings", 8192), begin=True, end=True),
        tokenizer=texts.tokenizer(source),
        layout={
            "prefix": texts.prefix(source, "model."),
            "stored": texts.stored(source, "decoder.weight"),
        },
    )


def layer_types(config: Config) -> list[str]:
    """Which layers see everything: one in `global_attn_every_n_layers`, where the config does not list them."""
    every, depth = config.get("global_attn_every_n_layers", 3), config["num_hidden_layers"]
    return config.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(depth)]


def layer(source: Source, config: Config, kind: str, norm: Config) -> Config:
    """The factory of a layer; `local_attention` is the whole window, half of it on each side."""
    local = kind == "sliding_attention"
    theta = config.get("local_rope_theta", 10_000.0) if local else config.get("global_rope_theta", 160_000.0)
    said = (config.get("rope_parameters") or {}).get(kind) or {"rope_theta": theta}
    return parts.block(
        attention=parts.attention(
            config["num_attention_heads"],
            bias=config.get("attention_bias", False),
            rotary=texts.rotary(source, said),
            visibility=texts.visibility(window=config.get("local_attention", 128) // 2) if local else None,
        ),
        feedforward=parts.feedforward(
            config["hidden_size"],
            config["intermediate_size"],
            config.get("hidden_activation", "gelu"),
            gated=True,
            bias=config.get("mlp_bias", False),
        ),
        norm=norm,
    )


def vocabulary(config: Config) -> Config:
    """The head for masked words."""
    dim = config["hidden_size"]
    dense = texts.linear(dim, dim, config.get("classifier_bias", False))
    act = texts.built(parts.activation(config.get("classifier_activation", "gelu")))
    return texts.vocabulary(
        dim,
        config["vocab_size"],
        tied=config.get("tie_word_embeddings", True),
        transform=texts.sequence(dense, act, texts.built(layer_norm(config), normalized_shape=dim)),
        bias=config.get("decoder_bias", True),
    )


def layer_norm(config: Config) -> Config:
    """The factory of the norms."""
    return parts.factory("torch.nn.LayerNorm", eps=config.get("norm_eps", 1e-5), bias=config.get("norm_bias", False))


def rules(described: Described) -> list[Rule]:
    """The table of transformers' ModernBERT."""
    prefix = described.layout["prefix"]
    theirs = f"{prefix}layers.{{i}}."
    return [
        Rule((f"{prefix}embeddings.tok_embeddings.weight",), (TABLE,), Rows()),
        *rename(f"{prefix}embeddings.norm", f"{STACK}.entry_norm"),
        *rename(theirs + "attn_norm", f"{LAYER}.attention_norm"),
        *rename(theirs + "attn.Wqkv", f"{LAYER}.attention.qkv"),
        *rename(theirs + "attn.Wo", f"{LAYER}.attention.out"),
        *rename(theirs + "mlp_norm", f"{LAYER}.feedforward_norm"),
        *rename(theirs + "mlp.Wi", f"{LAYER}.feedforward.up"),
        *rename(theirs + "mlp.Wo", f"{LAYER}.feedforward.down"),
        *rename(f"{prefix}final_norm", f"{STACK}.norm"),
        *rename("head.dense", "heads.vocabulary.transform.0"),
        *rename("head.norm", "heads.vocabulary.transform.2"),
        Rule(("decoder.bias",), (f"{SCORES}.bias",), Rows()),
        *texts.if_stored(described, "decoder.weight", f"{SCORES}.weight"),
    ]


FAMILIES = (
    Family(
        name="modernbert",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        options=(*SIZES, "local_attention", "tie_word_embeddings", "max_position_embeddings"),
    ),
)
