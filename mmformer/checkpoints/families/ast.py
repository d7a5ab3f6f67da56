"""AST as transformers saves it: overlapping patches of a spectrogram behind a class and a distillation token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.changes import Chain, GridPositions, Joined, Permuted, Reshaped
from mmformer.checkpoints.families import parts, sounds, texts, towers
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.sounds import AUDIO
from mmformer.checkpoints.families.towers import Layers
from mmformer.checkpoints.families.vit import LABEL, label_rules, other_classes
from mmformer.checkpoints.preprocessing import Statistics
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, join, rename

DEFAULTS: Config = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "patch_size": 16,
    "qkv_bias": True,
    "frequency_stride": 10,
    "time_stride": 10,
    "max_length": 1024,
    "num_mel_bins": 128,
}
"""What a config.json leaves out that says nothing else."""

AUDIOSET = Statistics(mean=(-4.2677393,), std=(2 * 4.5689974,))
"""What is subtracted from a spectrogram, padding and all, and what it is divided by."""

SIZES = ("max_length", "num_mel_bins")
LAYER = f"{AUDIO}.stages.0.layers.{{i}}"


def matches(source: Source) -> bool:
    """`ASTModel`, or a model around it."""
    if source.config:
        return source.config.get("model_type") == "audio-spectrogram-transformer"
    return _prefix(source) != "" and source.has(f"{_prefix(source)}embeddings.distillation_token")


def _prefix(source: Source) -> str:
    return texts.prefix(source, "audio_spectrogram_transformer.")


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that config.json describes.

    `max_length` asks for spectrograms of so many frames, `num_mel_bins` for so many mel bins: positions are
    interpolated. `num_classes` asks for a new head with so many outputs.
    """
    if not source.config:
        raise parts.lacks(source, "its config.json")
    config = DEFAULTS | source.config
    wanted = config | {name: options[name] for name in SIZES if name in options}
    layers = Layers(
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        act=config["hidden_act"],
        eps=config["layer_norm_eps"],
        qkv_bias=config["qkv_bias"],
    )
    found = sounds.read(source, config)
    pool = parts.part("mmformer.pooling.FirstPool", count=2)
    encoder = parts.encoder(_embedder(wanted, found.audio_statistics or AUDIOSET), [layers.stack()], pool)
    classes = options.get("num_classes", towers.outputs(source, "classifier.dense"))
    norm = texts.built(layers.norm, normalized_shape=layers.dim)
    heads = {"label": texts.sequence(norm, texts.linear(layers.dim, classes))} if classes else {}
    feature = found.audio or parts.part("mmformer.datasets.mels.KaldiMel", waveform=sounds.waveform())
    return Described(
        model=parts.model({"audio": encoder}, heads),
        features={"audio": feature | {"num_mels": wanted["num_mel_bins"], "frames": wanted["max_length"]}},
        layout={"prefix": _prefix(source), "grid": _grid(config)[::-1]},
        **other_classes(options, "classifier.*"),
    )


def _grid(config: Config) -> tuple[int, int]:
    """Patches in time and over the mel bins."""
    size = config["patch_size"]
    return (
        (config["max_length"] - size) // config["time_stride"] + 1,
        (config["num_mel_bins"] - size) // config["frequency_stride"] + 1,
    )


def _embedder(config: Config, statistics: Statistics) -> Config:
    dim, (rows, columns), axes = config["hidden_size"], _grid(config), ["time", "column"]
    return parts.part(
        "mmformer.encoders.PlaneEmbedder",
        dim=dim,
        stem=parts.part(
            "mmformer.encoders.StridedPatches",
            dim=dim,
            channels=1,
            size=[config["patch_size"]] * 2,
            stride=[config["time_stride"], config["frequency_stride"]],
        ),
        normalize=parts.part("mmformer.encoders.Normalize", mean=list(statistics.mean), std=list(statistics.std)),
        modality="audio",
        axes=axes,
        position=parts.factory("mmformer.nn.GridTable", rows=rows, columns=columns, axes=axes),
        class_tokens=parts.factory("mmformer.encoders.ClassTokens", count=2, positions=True),
    )


def rules(described: Described) -> list[Rule]:
    """The table of AST in transformers, whose rows are mel bins and whose columns are frames: ours are swapped."""
    start, ours = described.layout["prefix"], f"{AUDIO}.embedder"
    theirs, embeddings = start + "encoder.layer.{i}.", start + "embeddings."
    projection = f"{embeddings}patch_embeddings.projection"
    tokens = (f"{embeddings}cls_token", f"{embeddings}distillation_token")
    places = (f"{ours}.class_tokens.positions", f"{ours}.position.table")
    grid = GridPositions(num_class=2, grid=described.layout["grid"], swapped=True)
    queries = [f"{theirs}attention.attention.{name}" for name in ("query", "key", "value")]
    return [
        Rule(tokens, (f"{ours}.class_tokens.tokens",), Chain((Joined((1, 1)), Reshaped((2, 1, -1), (2, -1))))),
        Rule((f"{embeddings}position_embeddings",), places, grid),
        Rule((f"{projection}.weight",), (f"{ours}.stem.convolution.weight",), Permuted((0, 1, 3, 2))),
        Rule((f"{projection}.bias",), (f"{ours}.stem.convolution.bias",)),
        *join(queries, f"{LAYER}.attention.qkv"),
        *towers.layer_rules(
            LAYER, theirs, "layernorm_before", "attention.output.dense", "layernorm_after", "intermediate.dense",
            "output.dense",
        ),
        *rename(f"{start}layernorm", f"{AUDIO}.stages.0.norm"),
        *label_rules(
            described, *rename("classifier.layernorm", f"{LABEL}.0"), *rename("classifier.dense", f"{LABEL}.1")
        ),
    ]  # fmt: skip


FAMILIES = (
    Family(
        name="ast",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        options=(*SIZES, "num_classes"),
    ),
)
