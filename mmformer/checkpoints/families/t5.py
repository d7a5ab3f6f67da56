"""The encoder of T5: norms without a mean, scores that a learned number for each distance raises, no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.changes import Rows
from mmformer.checkpoints.families import parts, texts
from mmformer.checkpoints.families.texts import LAYER, STACK, TABLE
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, join, rename

SIZES = ("d_ff", "d_kv", "d_model", "num_heads", "num_layers", "relative_attention_num_buckets", "vocab_size")


def matches(source: Source) -> bool:
    """A T5 that transformers saved, whole or its encoder; without a config, one by its names."""
    if "model_type" in source.config:
        return source.config["model_type"] in ("t5", "mt5")
    return source.has("shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The encoder that `config.json` describes. Version 1.0 has one map before the non-linearity, 1.1 a gate."""
    config = texts.settings(source, options, *SIZES)
    dim, kind = config["d_model"], config.get("feed_forward_proj", "relu")
    gated, act = kind.startswith("gated-"), "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    norm = parts.factory("torch.nn.RMSNorm", eps=config.get("layer_norm_epsilon", 1e-6))
    bias = parts.part(  # built once, so that all layers share its table
        "mmformer.nn.RelativeBias",
        num_heads=config["num_heads"],
        num_buckets=config["relative_attention_num_buckets"],
        max_distance=config.get("relative_attention_max_distance", 128),
    )
    layer = parts.block(
        attention=parts.attention(config["num_heads"], head_dim=config["d_kv"], bias=False, kernel=bias),
        feedforward=parts.feedforward(dim, config["d_ff"], act, gated=gated, bias=False),
        norm=norm,
    )
    embedder = parts.part("mmformer.encoders.TextEmbedder", dim=dim, vocab_size=config["vocab_size"])
    stack = parts.transformer(dim, config["num_layers"], [layer], norm=norm)
    return Described(
        model=parts.model({"text": parts.encoder(embedder, [stack])}),
        features=texts.features(config.get("n_positions", 512), end=True),
        tokenizer=texts.tokenizer(source),
        layout={"gated": gated},
    )


def rules(described: Described) -> list[Rule]:
    """The table of transformers' T5, whose first layer alone stores the numbers for distances."""
    theirs, gated = "encoder.block.{i}.layer.", described.layout["gated"]
    maps = theirs + "1.DenseReluDense."
    joined = join([maps + "wi_0", maps + "wi_1"], f"{LAYER}.feedforward.up", bias=False)
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return [
        Rule(("shared.weight",), (TABLE,), Rows()),
        Rule((first,), (f"{LAYER.format(i=0)}.attention.kernel.table.weight",)),
        *rename(theirs + "0.layer_norm", f"{LAYER}.attention_norm", bias=False),
        *join([theirs + f"0.SelfAttention.{name}" for name in "qkv"], f"{LAYER}.attention.qkv", bias=False),
        *rename(theirs + "0.SelfAttention.o", f"{LAYER}.attention.out", bias=False),
        *rename(theirs + "1.layer_norm", f"{LAYER}.feedforward_norm", bias=False),
        *(joined if gated else rename(maps + "wi", f"{LAYER}.feedforward.up", bias=False)),
        *rename(maps + "wo", f"{LAYER}.feedforward.down", bias=False),
        *rename("encoder.final_layer_norm", f"{STACK}.norm", bias=False),
    ]


FAMILIES = (
    Family(
        name="t5",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        ignored={
            "decoder.*": "the encoder alone is described",
            "lm_head.weight": "the scores of the decoder, which is not described",
            "encoder.embed_tokens.weight": "a copy of shared.weight",
        },
        options=(*SIZES, "relative_attention_max_distance", "feed_forward_proj", "layer_norm_epsilon"),
    ),
)
