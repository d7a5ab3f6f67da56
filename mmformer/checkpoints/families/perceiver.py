"""Perceiver IO as transformers saves it: latents that look at inputs once, and then at each other.

Texts, and pictures whose pixels a map of one pixel embeds, are read as they are. What else the original turns into
inputs (convolutions with a batch norm, Fourier features, sound and video side by side) is to be given ready-made, a
vector each. Where a file classifies, one more query looks at the latents; other decoders are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmformer.checkpoints.changes import ConvolutionPatches, GridPositions, Rows
from mmformer.checkpoints.families import crossing, parts, texts, towers
from mmformer.checkpoints.families.crossing import FIRST
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.towers import Pictures
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, join, rename
from mmformer.tokens import LATENT

DEFAULTS: Config = {
    "num_latents": 256, "d_latents": 1280, "d_model": 768, "num_blocks": 1, "num_self_attends_per_block": 26,
    "num_self_attention_heads": 8, "num_cross_attention_heads": 8, "qk_channels": None, "v_channels": None,
    "cross_attention_shape_for_attention": "kv", "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1, "hidden_act": "gelu", "vocab_size": 262, "max_position_embeddings": 2048,
    "image_size": 56,
}  # fmt: skip
"""What a config.json leaves out that says nothing else."""

EPS = 1e-5
"""The norms do not read the config's `layer_norm_eps`."""

INPUTS = "inputs"
"""The modality of vectors that are given ready-made."""

CLASSIFIERS = ("PerceiverForSequenceClassification", "PerceiverForImageClassification")
DECODER = "decoder.decoder."
READY = ("convnet.*", "conv_after_patches.*", "modalities.*", "mask.*", "padding.*")
"""Tensors of preprocessors whose vectors are given ready-made."""

GIVEN = "turns raw items into vectors as no encoder of mmformer does: give them ready-made"
ANSWERS = "answers with queries that no part of mmformer makes: the latents are what comes out"


def matches(source: Source) -> bool:
    """`PerceiverModel`, or a model around it."""
    if source.config:
        return source.config.get("model_type") == "perceiver"
    start = texts.prefix(source, "perceiver.")
    return source.has(f"{start}embeddings.latents", f"{start}encoder.cross_attention.attention.self.query.weight")


@dataclass(frozen=True, kw_only=True)
class Looks:
    """A layer in which latents look at a context, or at each other where that has no `context` channels."""

    dim: int
    heads: int
    keys: int
    values: int
    widening: int
    act: str
    context: int | None = None

    def layer(self) -> Config:
        """The layer."""
        head_dim = [self.keys // self.heads, self.values // self.heads]
        branch = {"attention": parts.attention(self.heads, head_dim=head_dim)}
        if self.context is not None:
            cross = parts.cross_attention(self.heads, head_dim=head_dim, context_dim=self.context)
            options = {"context_dim": self.context, "norm": parts.layer_norm(EPS)}
            branch = {"cross": parts.factory("mmformer.nn.ContextNorm", part=cross, **options)}
        feedforward = parts.feedforward(self.dim, self.widening * self.dim, self.act)
        return parts.block(feedforward=feedforward, norm=parts.layer_norm(EPS), **branch)

    def rules(self, theirs: str, ours: str) -> list[Rule]:
        """The table of the layer."""
        inside, sizes = f"{theirs}attention.self.", (self.keys, self.keys, self.values)
        names = [f"{inside}{name}" for name in ("query", "key", "value")]
        branch, part = "attention", f"{ours}.attention"
        found = join(names, f"{part}.qkv", sizes)
        if self.context is not None:
            branch, part = "cross", f"{ours}.cross.part"
            found = [
                *rename(names[0], f"{part}.query"),
                *join(names[1:], f"{part}.key_value", sizes[1:]),
                *rename(f"{inside}layernorm2", f"{ours}.cross.norm"),
            ]
        return [
            *found,
            *rename(f"{inside}layernorm1", f"{ours}.{branch}_norm"),
            *rename(f"{theirs}attention.output.dense", f"{part}.out"),
            *rename(f"{theirs}layernorm", f"{ours}.feedforward_norm"),
            *rename(f"{theirs}mlp.dense1", f"{ours}.feedforward.up"),
            *rename(f"{theirs}mlp.dense2", f"{ours}.feedforward.down"),
        ]


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that config.json describes, with the encoder of what its file reads."""
    if not source.config:
        raise parts.lacks(source, "its config.json")
    config, start = DEFAULTS | source.config, texts.prefix(source, "perceiver.")
    texts.refuse(source, config, use_query_residual=True)
    context = towers.shape_of(source, f"{start}encoder.cross_attention.attention.self.layernorm2.weight")[0]
    looks = {"cross": _looks(config, "cross", context), "self": _looks(config, "self", None)}
    modality, encoder, features, pictures = _inputs(source, options, config, start, context)
    fusion = _fusion(looks, config, modality)
    ignored = {f"{start}input_preprocessor.{name}": GIVEN for name in READY if modality == INPUTS}
    heads, layout = {}, {"prefix": start, "modality": modality, "stack": "fusion.transformer"}
    names = source.config.get("architectures") or ["PerceiverModel"]
    if any(name.startswith(CLASSIFIERS) for name in names):
        width = towers.shape_of(source, f"{start}{DECODER}final_layer.bias")[0]
        looks["decoder"] = _decoder(config)
        heads["label"] = texts.linear(config["d_latents"], width)
        stack = _stack(config, [looks["decoder"].layer()])
        last = _latents(config["d_latents"], 1, modality, stack, FIRST)
        fusion = crossing.cascade({modality: fusion}, last)
        layout["stack"] = f"fusion.earlier.{modality}.transformer"
    else:
        names = (f"{start}decoder.*", f"{start}output_postprocessor.*", "embedding_decoder.bias")
        ignored |= dict.fromkeys(names, ANSWERS)
    return Described(
        model=parts.model({modality: encoder}, heads, fusion=fusion),
        features=features,
        tokenizer=texts.tokenizer(source),
        layout={
            **layout,
            "looks": {name: asdict(look) for name, look in looks.items()},  # plain, as it is saved with a model
            "depth": config["num_self_attends_per_block"],
            "blocks": config["num_blocks"],
            **pictures,
        },
        ignored=ignored,
    )


def _looks(config: Config, kind: str, context: int | None) -> Looks:
    """A layer of the encoder; channels that the config does not name are as many as queries or inputs have."""
    like_inputs = context if config["cross_attention_shape_for_attention"] == "kv" else None
    keys: int = config["qk_channels"] or like_inputs or config["d_latents"]
    return Looks(
        dim=config["d_latents"],
        heads=config[f"num_{kind}_attention_heads"],
        keys=keys,
        values=config["v_channels"] or keys,
        widening=config[f"{kind}_attention_widening_factor"],
        act=config["hidden_act"],
        context=context,
    )


def _decoder(config: Config) -> Looks:
    """The layer in which one query looks at the latents, of one head."""
    dim = config["d_latents"]
    return Looks(dim=dim, heads=1, keys=dim, values=dim, widening=1, act=config["hidden_act"], context=dim)


def _stack(config: Config, layers: list[Config]) -> Config:
    return parts.transformer(config["d_latents"], len(layers), layers, norm=None)


def _latents(dim: int, count: int, modality: str, stack: Config, pool: Config) -> Config:
    return crossing.fusion(dim, [LATENT], [modality], stack, pool, num_latents=count)


def _fusion(looks: Mapping[str, Looks], config: Config, modality: str) -> Config:
    """The encoder: the layers among latents are gone through several times where there are several blocks."""
    among = [looks["self"].layer()] * config["num_self_attends_per_block"]
    if config["num_blocks"] > 1:
        among = [parts.factory("mmformer.nn.Looped", layers=among, times=config["num_blocks"])]
    stack = _stack(config, [looks["cross"].layer(), *among])
    pool = parts.part("mmformer.pooling.MeanPool")
    return _latents(config["d_latents"], config["num_latents"], modality, stack, pool)


def _inputs(
    source: Source, options: Mapping[str, Any], config: Config, start: str, context: int
) -> tuple[str, Config, Config, dict[str, Any]]:
    """The modality that the file reads, its encoder, its features, and what the table must know of it."""
    given = f"{start}input_preprocessor."
    if texts.stored(source, f"{given}embeddings.weight", f"{given}position_embeddings.weight"):
        length = config["max_position_embeddings"]
        embedder = parts.part(
            "mmformer.encoders.TextEmbedder",
            dim=context,
            vocab_size=config["vocab_size"],
            position=parts.factory("mmformer.nn.Learned", num_positions=length),
        )
        return "text", parts.encoder(embedder, []), texts.features(length, begin=True, end=True), {}
    if texts.stored(source, f"{given}convnet_1x1.weight", f"{given}positions_projection.weight"):
        return "image", *_pixels(source, options, config, given)
    embedder = parts.part(
        "mmformer.encoders.TimeEmbedder",
        dim=context,
        stem=parts.part("mmformer.encoders.ReadyVectors"),
        modality=INPUTS,
    )
    return INPUTS, parts.encoder(embedder, []), {}, {}


def _pixels(
    source: Source, options: Mapping[str, Any], config: Config, given: str
) -> tuple[Config, Config, dict[str, Any]]:
    """Pixels one by one, with a learned vector for where each stands behind its channels."""
    width, channels = towers.shape_of(source, f"{given}convnet_1x1.weight")[:2]
    pictures = towers.read_pictures(
        source, options, size=config["image_size"], patch=1, channels=channels, colours=towers.IMAGENET
    )
    inner, outer = (towers.shape_of(source, f"{given}positions_projection.weight")[axis] for axis in (1, 0))
    rows, columns = pictures.size
    table = parts.part("mmformer.nn.GridTable", dim=inner, rows=rows, columns=columns)
    position = texts.sequence(table, texts.linear(inner, outer))
    embedder = towers.embedder(width, pictures, tokens=0) | {"position": None}
    encoder = parts.encoder(embedder, [parts.part("mmformer.nn.PositionBeside", position=position)])
    return encoder, _cropped(source, pictures), pictures.layout()


def _cropped(source: Source, pictures: Pictures) -> Config:
    """The middle of a picture: its processor cuts out 224 of 256 parts, and then resizes."""
    height, width = pictures.size
    cut = (source.json("preprocessor_config.json").get("crop_size") or {}).get("height")
    side = cut or round(min(height, width) * 256 / 224)
    resize = "mmformer.datasets.resize"
    steps = [
        parts.part(f"{resize}.ShortestSide", side=max(side, height, width)),
        parts.part(f"{resize}.CentreCrop", height=height, width=width),
    ]
    return {"image": parts.part("mmformer.datasets.features.Picture", steps=steps, channels=pictures.channels)}


def rules(described: Described) -> list[Rule]:
    """The table of Perceiver in transformers."""
    layout = described.layout
    start, stack, looks = layout["prefix"], layout["stack"], {k: Looks(**look) for k, look in layout["looks"].items()}
    found = [
        Rule((f"{start}embeddings.latents",), (f"{stack.removesuffix('transformer')}latents",)),
        *looks["cross"].rules(f"{start}encoder.cross_attention.", f"{stack}.layers.0"),
    ]
    for i in range(layout["depth"]):
        ours = f"{stack}.layers.1.layers.{i}" if layout["blocks"] > 1 else f"{stack}.layers.{i + 1}"
        found += looks["self"].rules(f"{start}encoder.self_attends.{i}.", ours)
    return [*found, *_input_rules(layout, f"{start}input_preprocessor."), *_decoder_rules(looks, f"{start}{DECODER}")]


def _input_rules(layout: Mapping[str, Any], given: str) -> list[Rule]:
    embedder, beside = f"encoders.{layout['modality']}.embedder", "encoders.image.stages.0.position"
    if layout["modality"] == "text":
        return [
            Rule((f"{given}embeddings.weight",), (f"{embedder}.table.weight",), Rows()),
            Rule((f"{given}position_embeddings.weight",), (f"{embedder}.position.table.weight",), Rows()),
        ]
    if layout["modality"] == INPUTS:
        return []
    grid = GridPositions(num_class=0, grid=layout["grid"], batched=False)
    return [
        Rule((f"{given}convnet_1x1.weight",), (f"{embedder}.stem.linear.weight",), ConvolutionPatches((1, 1))),
        Rule((f"{given}convnet_1x1.bias",), (f"{embedder}.stem.linear.bias",)),
        Rule((f"{given}position_embeddings.position_embeddings",), (f"{beside}.0.table",), grid),
        *rename(f"{given}positions_projection", f"{beside}.1"),
    ]


def _decoder_rules(looks: Mapping[str, Looks], theirs: str) -> list[Rule]:
    if "decoder" not in looks:
        return []
    return [
        Rule((f"{theirs}output_position_encodings.position_embeddings",), ("fusion.last.latents",)),
        *looks["decoder"].rules(f"{theirs}decoding_cross_attention.", "fusion.last.transformer.layers.0"),
        *rename(f"{theirs}final_layer", "heads.label"),
    ]


FAMILIES = (
    Family(
        name="perceiver",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        options=towers.PICTURE_OPTIONS,
    ),
)
