"""BERT: a Transformer encoder with norms behind its branches, and the heads it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.changes import Rows
from mmformer.checkpoints.families import parts, texts
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.texts import LAYER, SCORES, STACK, TABLE, TEXT
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, join, rename

SIZES = (
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "type_vocab_size", "vocab_size",
)  # fmt: skip
OPTIONS = (*SIZES, "hidden_act", "layer_norm_eps", "tie_word_embeddings", "is_decoder")

IGNORED = {
    "*embeddings.position_ids": "a buffer that counts 0, 1, 2, ...",
    "*embeddings.token_type_ids": "a buffer of zeros",
}


def matches(source: Source) -> bool:
    """A BERT that transformers saved, with or without heads; without a config, one by its names."""
    if "model_type" in source.config:
        return source.config["model_type"] == "bert"
    return any(has_layers(source, prefix) for prefix in ("", "bert."))


def has_layers(source: Source, prefix: str) -> bool:
    """Whether the names are those of BERT's layers, without cross-attention."""
    query = f"{prefix}encoder.layer.0.attention.self.query.weight"
    crossing = f"{prefix}encoder.layer.0.crossattention.self.query.weight"
    return source.has(f"{prefix}embeddings.word_embeddings.weight", query) and not source.has(crossing)


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that `config.json` describes: the encoder, and those heads whose weights the file has."""
    config = texts.settings(source, options, *SIZES)
    prefix, dim = texts.prefix(source, "bert."), config["hidden_size"]
    heads = {}
    if any(name.startswith("cls.predictions.") for name in source.tensors):
        heads["vocabulary"] = vocabulary(config, config.get("hidden_act", "gelu"))
    if source.has("cls.seq_relationship.weight"):
        heads["next_sentence"] = texts.linear(dim, 2)
    if source.has("classifier.weight"):
        heads["label"] = texts.linear(dim, source.tensors.shape("classifier.weight")[0])
    return Described(
        model=parts.model({"text": encoder(source, config, prefix)}, heads),
        features=texts.features(config["max_position_embeddings"], begin=True, end=True),
        tokenizer=texts.tokenizer(source),
        layout={"prefix": prefix, "stored": stored_scores(source, "cls.predictions.")},
        ignored=unused_bias(source, "cls.predictions."),
    )


def encoder(source: Source, config: Config, prefix: str, offset: int = 0) -> Config:
    """The encoder; `offset` positions in front of the table belong to no place."""
    texts.refuse(source, config, add_cross_attention=False, position_embedding_type="absolute")
    dim, norm = config["hidden_size"], layer_norm(config)
    layer = parts.block(
        attention=parts.attention(config["num_attention_heads"]),
        feedforward=parts.feedforward(dim, config["intermediate_size"], config.get("hidden_act", "gelu")),
        norm=norm,
        post_norm=True,
    )
    places = parts.factory("mmformer.nn.Learned", num_positions=config["max_position_embeddings"], offset=offset)
    embedder = parts.part(
        "mmformer.encoders.TextEmbedder",
        dim=dim,
        vocab_size=config["vocab_size"],
        position=places,
        num_types=config["type_vocab_size"],
    )
    stack = parts.transformer(
        dim,
        config["num_hidden_layers"],
        [layer],
        visibility=texts.visibility(causal=bool(config.get("is_decoder"))),
        norm=None,
        entry_norm=norm,
    )
    first = parts.part("mmformer.pooling.FirstPool")
    pooler = texts.sequence(first, texts.linear(dim, dim), parts.part("torch.nn.Tanh"))
    return parts.encoder(embedder, [stack], pooler if source.has(f"{prefix}pooler.dense.weight") else None)


def vocabulary(config: Config, act: str) -> Config:
    """The head for masked words: a dense layer, a non-linearity and a norm before the scores."""
    dim = config["hidden_size"]
    norm = texts.built(layer_norm(config), normalized_shape=dim)
    return texts.vocabulary(
        dim,
        config["vocab_size"],
        tied=config.get("tie_word_embeddings", True),
        transform=texts.sequence(texts.linear(dim, dim), texts.built(parts.activation(act)), norm),
    )


def layer_norm(config: Config) -> Config:
    """The factory of the norms."""
    return parts.layer_norm(config.get("layer_norm_eps", 1e-12))


def stored_scores(source: Source, head: str) -> list[str]:
    """Which of the scores' own tensors the file has."""
    return texts.stored(source, f"{head}decoder.weight", f"{head}decoder.bias")


def score_rules(described: Described, head: str) -> list[Rule]:
    """Rules for the scores of a head that is named `head` ("lm_head.").

    Files of transformers before 5 repeat the word embeddings as `decoder.weight` and the bias as `decoder.bias`; an
    untied head computes with `decoder.bias`.
    """
    bias = "decoder.bias" if f"{head}decoder.bias" in described.layout["stored"] else "bias"
    weight = texts.if_stored(described, f"{head}decoder.weight", f"{SCORES}.weight")
    return [*weight, Rule((f"{head}{bias}",), (f"{SCORES}.bias",), Rows())]


def unused_bias(source: Source, head: str) -> dict[str, str]:
    """The bias beside the decoder's own: its copy, or one that nothing reads."""
    return {f"{head}bias": "decoder.bias is the one in use"} if source.has(f"{head}decoder.bias") else {}


def rules(described: Described) -> list[Rule]:
    """The table of transformers' BERT."""
    return [
        *encoder_rules(described.layout["prefix"]),
        *rename("cls.predictions.transform.dense", "heads.vocabulary.transform.0"),
        *norm_rules("cls.predictions.transform.LayerNorm", "heads.vocabulary.transform.2"),
        *score_rules(described, "cls.predictions."),
        *rename("cls.seq_relationship", "heads.next_sentence"),
        *rename("classifier", "heads.label", Rows()),
    ]


def encoder_rules(prefix: str) -> list[Rule]:
    """The rows that RoBERTa shares."""
    embeddings, theirs = f"{prefix}embeddings.", f"{prefix}encoder.layer.{{i}}."
    return [
        Rule((embeddings + "word_embeddings.weight",), (TABLE,), Rows()),
        Rule((embeddings + "position_embeddings.weight",), (f"{TEXT}.embedder.position.table.weight",), Rows()),
        Rule((embeddings + "token_type_embeddings.weight",), (f"{TEXT}.embedder.types",)),
        *norm_rules(embeddings + "LayerNorm", f"{STACK}.entry_norm"),
        *join([theirs + f"attention.self.{name}" for name in ("query", "key", "value")], f"{LAYER}.attention.qkv"),
        *rename(theirs + "attention.output.dense", f"{LAYER}.attention.out"),
        *norm_rules(theirs + "attention.output.LayerNorm", f"{LAYER}.attention_norm"),
        *rename(theirs + "intermediate.dense", f"{LAYER}.feedforward.up"),
        *rename(theirs + "output.dense", f"{LAYER}.feedforward.down"),
        *norm_rules(theirs + "output.LayerNorm", f"{LAYER}.feedforward_norm"),
        *rename(f"{prefix}pooler.dense", f"{TEXT}.pool.1"),
    ]


def norm_rules(source: str, target: str) -> list[Rule]:
    """A norm; the first files of BERT call weight and bias gamma and beta, as TensorFlow does."""
    old = [Rule((f"{source}.gamma",), (f"{target}.weight",)), Rule((f"{source}.beta",), (f"{target}.bias",))]
    return [*rename(source, target), *old]


FAMILIES = (
    Family(
        name="bert",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        ignored=IGNORED,
        options=OPTIONS,
    ),
)
