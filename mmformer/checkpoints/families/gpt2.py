"""GPT-2: a causal Transformer whose matrices are stored (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.changes import Rows, Transposed
from mmformer.checkpoints.families import parts, texts
from mmformer.checkpoints.families.texts import LAYER, SCORES, STACK, TABLE, TEXT
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, rename

SIZES = ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size")


def matches(source: Source) -> bool:
    """A GPT-2 that transformers saved, with or without its head; without a config, one by its names."""
    if "model_type" in source.config:
        return source.config["model_type"] == "gpt2"
    return any(source.has(f"{p}wte.weight", f"{p}h.0.attn.c_attn.weight") for p in ("", "transformer."))


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that `config.json` describes; its scores are tied to the embeddings, with or without a stored head."""
    config = texts.settings(source, options, *SIZES)
    texts.refuse(
        source, config, add_cross_attention=False, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False
    )
    dim, norm = config["n_embd"], parts.layer_norm(config.get("layer_norm_epsilon", 1e-5))
    layer = parts.block(
        attention=parts.attention(config["n_head"]),
        feedforward=parts.feedforward(
            dim, config.get("n_inner") or 4 * dim, config.get("activation_function", "gelu_new")
        ),
        norm=norm,
    )
    embedder = parts.part(
        "mmformer.encoders.TextEmbedder",
        dim=dim,
        vocab_size=config["vocab_size"],
        position=parts.factory("mmformer.nn.Learned", num_positions=config["n_positions"]),
    )
    stack = parts.transformer(dim, config["n_layer"], [layer], visibility=texts.visibility(causal=True), norm=norm)
    prefix = texts.prefix(source, "transformer.")
    tied = config.get("tie_word_embeddings", True)
    heads = texts.scores(source, dim, config["vocab_size"], tied)
    return Described(
        model=parts.model({"text": parts.encoder(embedder, [stack], parts.part("mmformer.pooling.LastPool"))}, heads),
        features=texts.features(config["n_positions"]),
        tokenizer=texts.tokenizer(source),
        layout={"prefix": prefix, "stored": texts.stored(source, "lm_head.weight")},
    )


def rules(described: Described) -> list[Rule]:
    """The table of transformers' GPT-2."""
    prefix = described.layout["prefix"]
    theirs = f"{prefix}h.{{i}}."
    return [
        Rule((f"{prefix}wte.weight",), (TABLE,), Rows()),
        Rule((f"{prefix}wpe.weight",), (f"{TEXT}.embedder.position.table.weight",), Rows()),
        *rename(theirs + "ln_1", f"{LAYER}.attention_norm"),
        *rename(theirs + "attn.c_attn", f"{LAYER}.attention.qkv", Transposed()),
        *rename(theirs + "attn.c_proj", f"{LAYER}.attention.out", Transposed()),
        *rename(theirs + "ln_2", f"{LAYER}.feedforward_norm"),
        *rename(theirs + "mlp.c_fc", f"{LAYER}.feedforward.up", Transposed()),
        *rename(theirs + "mlp.c_proj", f"{LAYER}.feedforward.down", Transposed()),
        *rename(f"{prefix}ln_f", f"{STACK}.norm"),
        *texts.if_stored(described, "lm_head.weight", f"{SCORES}.weight"),
    ]


FAMILIES = (
    Family(
        name="gpt2",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        # With the dot in front these are the buffers of the mask, and not the bias of c_attn.
        ignored=dict.fromkeys(("*h.*.attn.bias", "*h.*.attn.masked_bias"), "a buffer of the causal mask"),
        options=(*SIZES, "n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings"),
    ),
)
