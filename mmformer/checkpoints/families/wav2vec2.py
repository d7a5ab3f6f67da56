"""wav2vec 2.0 and HuBERT as transformers and torchaudio save them: one model, trained in two ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.families import parts, sounds, texts, towers
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.sounds import AUDIO
from mmformer.checkpoints.families.vit import other_classes
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, join, rename

DEFAULTS: Config = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
    "conv_dim": [512] * 7,
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
}
"""What a config.json leaves out that says nothing else."""

GUESSES = ("num_attention_heads", "do_stable_layer_norm", "conv_stride")
"""What the shapes of a file without a config do not say."""

PUBLISHED = {(768, 12): 12, (1024, 24): 16, (1280, 48): 16, (1920, 48): 16}
"""Heads of the models that torchaudio publishes, by their channels and layers."""

STEM, STACK, PLACE = f"{AUDIO}.embedder.stem", f"{AUDIO}.stages.1", f"{AUDIO}.stages.0"
LAYER = f"{STACK}.layers.{{i}}"
OLD, NEW = ("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")
"""Scale and direction of a normed weight, before and since PyTorch 2."""


def matches_wav2vec2(source: Source) -> bool:
    """A wav2vec 2.0 that transformers saved, or a model around it; without a config, one by its names."""
    if source.config:
        return source.config.get("model_type") == "wav2vec2"
    start = _prefix(source)
    return start != "hubert." and source.has(f"{start}encoder.layers.0.attention.q_proj.weight", *_first(start))


def matches_hubert(source: Source) -> bool:
    """A HuBERT that transformers saved, or a model around it."""
    return source.config.get("model_type") == "hubert" or (not source.config and _prefix(source) == "hubert.")


def matches_torchaudio(source: Source) -> bool:
    """A `Wav2Vec2Model` of torchaudio, which is wav2vec 2.0 or HuBERT, but not WavLM with its own attention."""
    start = _prefix(source)
    return source.has(f"{start}encoder.transformer.layers.0.attention.q_proj.weight", *_first(start))


def _prefix(source: Source) -> str:
    return texts.prefix(source, "wav2vec2.", "hubert.")


def _first(start: str) -> tuple[str, ...]:
    return (f"{start}feature_extractor.conv_layers.0.conv.weight",)


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that config.json describes; `num_classes` asks for a new head with so many outputs."""
    if not source.config:
        raise parts.lacks(source, "its config.json")
    config, start = DEFAULTS | source.config, _prefix(source)
    texts.refuse(source, config, add_adapter=False, adapter_attn_dim=None, conv_pos_batch_norm=False)
    if towers.outputs(source, "projector"):
        texts.refuse(source, config, use_weighted_layer_sum=False)
    names = {"projection": f"{start}feature_projection", "stack": f"{start}encoder", "head": "lm_head"}
    return _described(source, options, config, {"prefix": start, **names})


def describe_torchaudio(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that the tensors describe, with the `options` that they leave open.

    These are `num_attention_heads`, `do_stable_layer_norm` (whether norms stand in front of the branches) and
    `conv_stride`; `num_classes` asks for a new head.
    """
    start = _prefix(source)
    stack, projection = f"{start}encoder.transformer", f"{start}encoder.feature_projection"
    config = _shapes(source, start, stack) | {name: options[name] for name in GUESSES if name in options}
    if open_ones := [name for name in GUESSES if name not in config]:
        raise ValueError(
            f"{source.origin} does not say {', '.join(open_ones)}: give them as options{_as_published(config)}"
        )
    names = {"projection": projection, "stack": stack, "head": "aux"}
    return _described(source, options, config, {"prefix": start, **names})


def _as_published(config: Config) -> str:
    """What they are in a model that torchaudio publishes, where the sizes are those of one."""
    heads = PUBLISHED.get((config["hidden_size"], config["num_hidden_layers"]))
    if heads is None or config["conv_kernel"] != DEFAULTS["conv_kernel"]:
        return ""
    stable = config["feat_extract_norm"] == "layer"
    known = dict(zip(GUESSES, (heads, stable, DEFAULTS["conv_stride"]), strict=True))
    return f"; torchaudio's own model of this size has {known}"


def _shapes(source: Source, start: str, stack: str) -> Config:
    """The config of a file without one, as far as its shapes say it."""
    theirs = f"{start}feature_extractor.conv_layers."
    shapes = [towers.shape_of(source, f"{theirs}{place}.conv.weight") for place in range(towers.depth(source, theirs))]
    position = f"{stack}.pos_conv_embed.conv."
    dim, share, kernel = towers.shape_of(source, position + _weights(source, position)[1])
    return {
        "hidden_size": dim,
        "num_hidden_layers": towers.depth(source, f"{stack}.layers."),
        "intermediate_size": towers.shape_of(source, f"{stack}.layers.0.feed_forward.intermediate_dense.weight")[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "feat_extract_norm": "layer" if source.has(f"{theirs}1.layer_norm.weight") else "group",
        "feat_extract_activation": "gelu",
        "feat_proj_layer_norm": True,
        "conv_dim": [shape[0] for shape in shapes],
        "conv_kernel": [shape[2] for shape in shapes],
        "conv_bias": source.has(f"{theirs}0.conv.bias"),
        "num_conv_pos_embeddings": kernel,
        "num_conv_pos_embedding_groups": dim // share,
    }


def _weights(source: Source, position: str) -> tuple[str, str]:
    return OLD if source.has(f"{position}{OLD[1]}") else NEW


def _described(source: Source, options: Mapping[str, Any], config: Config, layout: dict[str, Any]) -> Described:
    dim, stable = config["hidden_size"], config["do_stable_layer_norm"]
    norm = parts.layer_norm(config["layer_norm_eps"])
    layer = parts.block(
        attention=parts.attention(config["num_attention_heads"]),
        feedforward=parts.feedforward(dim, config["intermediate_size"], config["hidden_act"]),
        norm=norm,
        post_norm=not stable,
    )
    norms = {"norm": norm if stable else None, "entry_norm": None if stable else norm}
    place = parts.part(
        "mmformer.nn.ConvolutionPosition",
        dim=dim,
        kernel=config["num_conv_pos_embeddings"],
        groups=config["num_conv_pos_embedding_groups"],
        activation=parts.activation(config["feat_extract_activation"]),
    )
    stack = parts.transformer(dim, config["num_hidden_layers"], [layer], **norms)
    letters = towers.outputs(source, layout["head"])
    heads = {"vocabulary": texts.vocabulary(dim, letters, tied=False)} if letters else {}
    position = f"{layout['stack']}.pos_conv_embed.conv."
    return Described(
        model=parts.model(
            {"audio": parts.encoder(_embedder(source, config, norm), [place, stack])},
            heads | sounds.classifier(source, options, dim),
        ),
        features={"audio": _feature(source, config)},
        layout={
            **layout,
            "entry": not stable,
            "weights": [position + name for name in _weights(source, position)],
        },
        **other_classes(options, "projector.*", "classifier.*"),
    )


def _embedder(source: Source, config: Config, norm: Config) -> Config:
    """The convolutions, with one norm over time ("group") or one over the channels of each ("layer").

    Raises:
        ValueError: another kind of norm.
    """
    kind = config["feat_extract_norm"]
    if kind not in ("group", "layer"):
        raise ValueError(f"{source.origin} has feat_extract_norm: {kind!r}, where 'group' or 'layer' belongs")
    return parts.part(
        "mmformer.encoders.waveform_convolutions",
        dim=config["hidden_size"],
        layers=[list(sizes) for sizes in _convolutions(config)],
        bias=config["conv_bias"],
        time_norm=kind == "group",
        norm=norm if config["feat_proj_layer_norm"] else None,
        activation=parts.activation(config["feat_extract_activation"]),
    )


def _convolutions(config: Config) -> list[tuple[int, int, int]]:
    return list(zip(config["conv_dim"], config["conv_kernel"], config["conv_stride"], strict=True))


def _feature(source: Source, config: Config) -> Config:
    """As the processor's file says; without one, torchaudio normalises recordings for norms over the channels alone."""
    if found := sounds.read(source, config).audio:
        return found
    reach = 1
    for _, kernel, stride in reversed(_convolutions(config)):
        reach = (reach - 1) * stride + kernel
    normalize = bool(source.config) or config["feat_extract_norm"] == "layer"
    return sounds.waveform(normalize=normalize, min_samples=reach)


def rules(described: Described) -> list[Rule]:
    """The table of both libraries: their names differ outside the layers alone."""
    layout = described.layout
    stack, projection = layout["stack"], layout["projection"]
    convolutions, theirs = f"{layout['prefix']}feature_extractor.conv_layers.{{i}}.", f"{stack}.layers.{{i}}."
    scale, direction = layout["weights"]
    queries = [f"{theirs}attention.{name}_proj" for name in "qkv"]
    return [
        *rename(convolutions + "conv", f"{STEM}.convolutions.{{i}}"),
        *rename(convolutions + "layer_norm", f"{STEM}.norms.{{i}}"),
        *rename(f"{projection}.layer_norm", f"{STEM}.norm"),
        *rename(f"{projection}.projection", f"{STEM}.linear"),
        Rule((scale,), (f"{PLACE}.scale",)),
        Rule((direction,), (f"{PLACE}.direction",)),
        Rule((f"{stack}.pos_conv_embed.conv.bias",), (f"{PLACE}.bias",)),
        *join(queries, f"{LAYER}.attention.qkv"),
        *towers.layer_rules(
            LAYER, theirs, "layer_norm", "attention.out_proj", "final_layer_norm", "feed_forward.intermediate_dense",
            "feed_forward.output_dense",
        ),
        *rename(f"{stack}.layer_norm", f"{STACK}.entry_norm" if layout["entry"] else f"{STACK}.norm"),
        *rename(layout["head"], "heads.vocabulary.out"),
        *sounds.classifier_rules(described),
    ]  # fmt: skip


QUANTIZER = "makes the targets of wav2vec 2.0's pre-training, which the encoder does without"
IGNORED = {
    "*masked_spec_embed": "stands for hidden frames, which this model does not have",
    "quantizer.*": QUANTIZER,
    "project_q.*": QUANTIZER,
    "project_hid.*": "compares with the targets of pre-training, which the encoder does without",
    "mask_generator.*": "stands for hidden frames, which this model does not have",
    "logit_generator.*": "compares with the targets of HuBERT's pre-training, which the encoder does without",
}

FAMILIES = (
    Family(
        name="wav2vec2",
        library="transformers",
        matches=matches_wav2vec2,
        describe=describe,
        rules=rules,
        ignored=IGNORED,
        options=("num_classes",),
    ),
    Family(
        name="hubert",
        library="transformers",
        matches=matches_hubert,
        describe=describe,
        rules=rules,
        ignored=IGNORED,
        options=("num_classes",),
    ),
    Family(
        name="wav2vec2",
        library="torchaudio",
        matches=matches_torchaudio,
        describe=describe_torchaudio,
        rules=rules,
        ignored=IGNORED,
        options=(*GUESSES, "num_classes"),
    ),
)
