"""Llama and its relatives: causal Transformers with RMSNorm, rotary positions, grouped queries and gated maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.changes import Rows
from mmformer.checkpoints.families import parts, texts
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.texts import LAYER, SCORES, STACK, TABLE
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, join, rename

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
OPTIONS = (
    *SIZES, "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "sliding_window",
    "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip
KINDS = ("llama", "mistral", "qwen2", "qwen3")


def matches(source: Source) -> bool:
    """A decoder of one of these kinds that transformers saved, with or without its head.

    Names alone do not tell them from others with the same names and other arithmetic, so a config must say the kind.
    """
    return source.config.get("model_type") in KINDS


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that `config.json` describes."""
    config = texts.settings(source, options, "model_type", *SIZES)
    if config["model_type"] not in KINDS:
        raise ValueError(f"{source.origin} is a {config['model_type']!r}: this table is for {', '.join(KINDS)}")
    dim, depth, norm = config["hidden_size"], config["num_hidden_layers"], rms_norm(config)
    embedder = parts.part("mmformer.encoders.TextEmbedder", dim=dim, vocab_size=config["vocab_size"])
    rotary = positions(source, config)
    feedforward = parts.feedforward(
        dim,
        config["intermediate_size"],
        config.get("hidden_act", "silu"),
        gated=True,
        bias=bool(config.get("mlp_bias")),
    )
    layers = [
        parts.block(attention=attention(config, rotary, window), feedforward=feedforward, norm=norm)
        for window in windows(config)
    ]
    stack = parts.transformer(dim, depth, texts.repeating(layers), visibility=texts.visibility(causal=True), norm=norm)
    longest = config.get("max_position_embeddings", 2048)
    heads = texts.scores(source, dim, config["vocab_size"], bool(config.get("tie_word_embeddings")))
    return Described(
        model=parts.model({"text": parts.encoder(embedder, [stack], parts.part("mmformer.pooling.LastPool"))}, heads),
        features=texts.features(longest, begin=not config["model_type"].startswith("qwen")),
        tokenizer=texts.tokenizer(source),
        layout={
            "prefix": texts.prefix(source, "model."),
            "parts": (config["num_attention_heads"], *[key_value_heads(config)] * 2),
            "stored": texts.stored(source, "lm_head.weight"),
        },
    )


def attention(config: Config, rotary: Config, window: int | None) -> Config:
    """The factory of self-attention, for one layer's window."""
    kind = config["model_type"]
    both = bool(config.get("attention_bias"))
    if kind == "qwen3":
        norm = rms_norm(config)
        rotary = parts.factory("mmformer.nn.NormedRotary", norm=norm, rotary=rotary)
    return parts.attention(
        config["num_attention_heads"],
        num_kv_heads=key_value_heads(config),
        head_dim=config.get("head_dim"),
        bias=[True, False] if kind == "qwen2" else both,
        rotary=rotary,
        visibility=None if window is None else texts.visibility(window=window),
    )


def key_value_heads(config: Config) -> int:
    """How many heads keys and values have."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def windows(config: Config) -> list[int | None]:
    """How far back each layer sees; `sliding_window` counts the token itself.

    Mistral limits all layers, Qwen those that `layer_types` or, before it, `max_window_layers` say, Llama none.
    """
    depth, kind, width = config["num_hidden_layers"], config["model_type"], config.get("sliding_window")
    if kind == "llama" or not width or (kind != "mistral" and not config.get("use_sliding_window")):
        return [None] * depth
    first = 0 if kind == "mistral" else config.get("max_window_layers", depth)
    listed = config.get("layer_types")
    limited = [name == "sliding_attention" for name in listed] if listed else [i >= first for i in range(depth)]
    return [width - 1 if local else None for local in limited]


def positions(source: Source, config: Config) -> Config:
    """The factory of rotary positions, from `rope_parameters` or from the two settings of files before it."""
    old = {"rope_theta": config.get("rope_theta", 10_000.0), **(config.get("rope_scaling") or {})}
    return texts.rotary(source, config.get("rope_parameters") or old)


def rms_norm(config: Config) -> Config:
    """The factory of the norms."""
    return parts.factory("torch.nn.RMSNorm", eps=config.get("rms_norm_eps", 1e-6))


def rules(described: Described) -> list[Rule]:
    """The table that Llama, Mistral, Qwen2 and Qwen3 share."""
    prefix = described.layout["prefix"]
    theirs = f"{prefix}layers.{{i}}."
    return [
        Rule((f"{prefix}embed_tokens.weight",), (TABLE,), Rows()),
        *rename(theirs + "input_layernorm", f"{LAYER}.attention_norm", bias=False),
        *join([theirs + f"self_attn.{n}_proj" for n in "qkv"], f"{LAYER}.attention.qkv", described.layout["parts"]),
        *rename(theirs + "self_attn.o_proj", f"{LAYER}.attention.out"),
        *rename(theirs + "self_attn.q_norm", f"{LAYER}.attention.rotary.query_norm", bias=False),
        *rename(theirs + "self_attn.k_norm", f"{LAYER}.attention.rotary.key_norm", bias=False),
        *rename(theirs + "post_attention_layernorm", f"{LAYER}.feedforward_norm", bias=False),
        *join([theirs + f"mlp.{name}_proj" for name in ("gate", "up")], f"{LAYER}.feedforward.up"),
        *rename(theirs + "mlp.down_proj", f"{LAYER}.feedforward.down"),
        *rename(f"{prefix}norm", f"{STACK}.norm", bias=False),
        *texts.if_stored(described, "lm_head.weight", f"{SCORES}.weight"),
    ]


FAMILIES = (
    Family(
        name="llama",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        ignored={"*rotary_emb.inv_freq": "a buffer that rope_theta gives"},
        options=OPTIONS,
    ),
)
