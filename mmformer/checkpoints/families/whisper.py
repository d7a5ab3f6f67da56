"""Whisper, encoder and decoder, as transformers and as OpenAI save it; its keys have no bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmformer.checkpoints.changes import Joined, Rows
from mmformer.checkpoints.families import parts, sounds, texts, towers
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.sounds import AUDIO
from mmformer.checkpoints.families.texts import SCORES, TABLE, TEXT
from mmformer.checkpoints.families.vit import other_classes
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import ZERO, Described, Family, Rule, join, rename

DEFAULTS: Config = {
    "vocab_size": 51865,
    "num_mel_bins": 80,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_layers": 4,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "encoder_ffn_dim": 1536,
    "activation_function": "gelu",
    "d_model": 384,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "tie_word_embeddings": True,
}
"""What a config.json leaves out that says nothing else."""

EPS = 1e-5
SIZES = ("vocab_size", "max_source_positions", "max_target_positions")
HEADS = ("encoder_attention_heads", "decoder_attention_heads")
ENCODER, DECODER = f"{AUDIO}.stages.0", "fusion.transformer"

OPENAI = {
    "layers": "blocks",
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "final_layer_norm": "mlp_ln",
    "self_attn": "attn",
    "encoder_attn": "cross_attn",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "embed_positions.weight": "positional_embedding",
    "embed_tokens": "token_embedding",
    "encoder.layer_norm": "encoder.ln_post",
    "decoder.layer_norm": "decoder.ln",
}
"""Parts of the names in transformers and in OpenAI's files, in the order in which they are replaced."""


def matches(source: Source) -> bool:
    """A Whisper that transformers saved, or its encoder with a classifier; without a config, one by its names."""
    if source.config:
        return source.config.get("model_type") == "whisper"
    start = texts.prefix(source, "model.")
    return source.has(f"{start}encoder.conv1.weight", f"{start}encoder.layers.0.self_attn.q_proj.weight")


def matches_openai(source: Source) -> bool:
    """A file that OpenAI published."""
    return source.has("encoder.conv1.weight", "encoder.blocks.0.attn.query.weight", "decoder.token_embedding.weight")


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that config.json describes; options with the names of its sizes go first.

    Positions and words that are more than the file's keep their own, fewer take the first. `num_classes` asks for a
    new head with so many outputs.
    """
    if not source.config:
        raise parts.lacks(source, "its config.json")
    config = DEFAULTS | texts.settings(source, options)
    if towers.outputs(source, "projector"):
        texts.refuse(source, config, use_weighted_layer_sum=False)
    start = texts.prefix(source, "model.")
    return _described(source, options, config, start)


def describe_openai(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that the tensors describe, with the heads that `dims` beside them or `options` say."""
    dims = source.extra.get("dims")
    dims = dims if isinstance(dims, dict) else {}
    said = dict(zip(HEADS, (dims.get("n_audio_head"), dims.get("n_text_head")), strict=True))
    config: Config = {"activation_function": "gelu", "tie_word_embeddings": True, **said, **_shapes(source), **options}
    for name in HEADS:
        if config[name] is None:
            raise parts.lacks(source, name)
    return _described(source, options, config, "")


def _shapes(source: Source) -> Config:
    dim, mels, _ = towers.shape_of(source, "encoder.conv1.weight")
    return {
        "vocab_size": towers.shape_of(source, "decoder.token_embedding.weight")[0],
        "num_mel_bins": mels,
        "encoder_layers": towers.depth(source, "encoder.blocks."),
        "decoder_layers": towers.depth(source, "decoder.blocks."),
        "encoder_ffn_dim": towers.shape_of(source, "encoder.blocks.0.mlp.0.weight")[0],
        "decoder_ffn_dim": towers.shape_of(source, "decoder.blocks.0.mlp.0.weight")[0],
        "d_model": dim,
        "max_source_positions": towers.shape_of(source, "encoder.positional_embedding")[0],
        "max_target_positions": towers.shape_of(source, "decoder.positional_embedding")[0],
    }


def _described(source: Source, options: Mapping[str, Any], config: Config, start: str) -> Described:
    dim, frames = config["d_model"], 2 * config["max_source_positions"]
    mel = sounds.read(source, config).audio or parts.part(
        "mmformer.datasets.mels.WhisperMel", waveform=sounds.waveform(), num_mels=config["num_mel_bins"]
    )
    features: Config = {"audio": mel | {"seconds": frames / 100}}
    encoders = {"audio": parts.encoder(_frames(config), [_stack(config, "encoder")])}
    heads, fusion = sounds.classifier(source, options, dim), {}
    if any(name.startswith(f"{start}decoder.") for name in source.tensors):
        encoders["text"] = parts.encoder(_words(config), [])
        fusion = {"fusion": _decoder(config)}
        tied = config["tie_word_embeddings"]
        if tied or source.has("proj_out.weight"):
            heads["vocabulary"] = texts.vocabulary(dim, config["vocab_size"], tied=tied, bias=False)
        features |= texts.features(config["max_target_positions"])
    return Described(
        model=parts.model(encoders, heads, **fusion),
        features=features,
        tokenizer=texts.tokenizer(source),
        layout={"prefix": start, "stored": texts.stored(source, "proj_out.weight")},
        **other_classes(options, "projector.*", "classifier.*"),
    )


def _frames(config: Config) -> Config:
    return parts.part(
        "mmformer.encoders.mel_frames",
        dim=config["d_model"],
        num_mels=config["num_mel_bins"],
        position=parts.factory("mmformer.nn.SinusoidTable", num_positions=config["max_source_positions"]),
    )


def _words(config: Config) -> Config:
    return parts.part(
        "mmformer.encoders.TextEmbedder",
        dim=config["d_model"],
        vocab_size=config["vocab_size"],
        position=parts.factory("mmformer.nn.Learned", num_positions=config["max_target_positions"]),
    )


def _decoder(config: Config) -> Config:
    """Words that look at the words before them and at the whole recording."""
    identity = parts.part("torch.nn.Identity")
    crossing = parts.cross_attention(config["decoder_attention_heads"])
    return parts.part(
        "mmformer.fusion.Fusion",
        dim=config["d_model"],
        stream=["text"],
        context=["audio"],
        transformer=_stack(config, "decoder", visibility=texts.visibility(causal=True), cross=crossing),
        pool=parts.part("mmformer.pooling.LastPool"),
        entrances={"text": identity, "audio": identity},
    )


def _stack(config: Config, kind: str, visibility: Config | None = None, **cross: Config) -> Config:
    """The Transformer of the encoder or the decoder, with the norm in front of each branch."""
    dim, norm = config["d_model"], parts.layer_norm(EPS)
    layer = parts.block(
        attention=parts.attention(config[f"{kind}_attention_heads"]),
        feedforward=parts.feedforward(dim, config[f"{kind}_ffn_dim"], config["activation_function"]),
        norm=norm,
        **cross,
    )
    return parts.transformer(dim, config[f"{kind}_layers"], [layer], visibility=visibility, norm=norm)


def rules(described: Described) -> list[Rule]:
    """The table of Whisper in transformers."""
    encoder, decoder = (f"{described.layout['prefix']}{kind}." for kind in ("encoder", "decoder"))
    ours, theirs = f"{DECODER}.layers.{{i}}", f"{decoder}layers.{{i}}."
    crossing = f"{theirs}encoder_attn."
    return [
        *rename(f"{encoder}conv1", f"{AUDIO}.embedder.stem.first"),
        *rename(f"{encoder}conv2", f"{AUDIO}.embedder.stem.second"),
        Rule((f"{encoder}embed_positions.weight",), (f"{AUDIO}.embedder.position.table",), Rows()),
        *_layer_rules(f"{ENCODER}.layers.{{i}}", f"{encoder}layers.{{i}}."),
        *rename(f"{encoder}layer_norm", f"{ENCODER}.norm"),
        Rule((f"{decoder}embed_tokens.weight",), (TABLE,), Rows()),
        Rule((f"{decoder}embed_positions.weight",), (f"{TEXT}.embedder.position.table.weight",), Rows()),
        *_layer_rules(ours, theirs),
        *rename(f"{theirs}encoder_attn_layer_norm", f"{ours}.cross_norm"),
        *rename(f"{crossing}q_proj", f"{ours}.cross.query"),
        *join([f"{crossing}{name}_proj" for name in "kv"], f"{ours}.cross.key_value", bias=False),
        Rule((ZERO, f"{crossing}v_proj.bias"), (f"{ours}.cross.key_value.bias",), Joined((1, 1))),
        *rename(f"{crossing}out_proj", f"{ours}.cross.out"),
        *rename(f"{decoder}layer_norm", f"{DECODER}.norm"),
        *texts.if_stored(described, "proj_out.weight", f"{SCORES}.weight"),
        *sounds.classifier_rules(described),
    ]


def _layer_rules(ours: str, theirs: str) -> list[Rule]:
    """The table of a layer but for its cross-attention."""
    own = f"{theirs}self_attn."
    return [
        *join([f"{own}{name}_proj" for name in "qkv"], f"{ours}.attention.qkv", bias=False),
        Rule((f"{own}q_proj.bias", ZERO, f"{own}v_proj.bias"), (f"{ours}.attention.qkv.bias",), Joined()),
        *towers.layer_rules(
            ours, theirs, "self_attn_layer_norm", "self_attn.out_proj", "final_layer_norm", "fc1", "fc2"
        ),
    ]


def rules_openai(described: Described) -> list[Rule]:
    """The table of OpenAI's files: that of transformers in other words."""
    return [replace(rule, sources=tuple(map(_in_openai_words, rule.sources))) for rule in rules(described)]


def _in_openai_words(name: str) -> str:
    for theirs, openai in OPENAI.items():
        name = name.replace(theirs, openai)
    return name


FAMILIES = (
    Family(
        name="whisper",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        options=(*SIZES, "num_classes"),
    ),
    Family(
        name="whisper",
        library="openai",
        matches=matches_openai,
        describe=describe_openai,
        rules=rules_openai,
        options=(*SIZES, *HEADS, "num_classes"),
    ),
)
