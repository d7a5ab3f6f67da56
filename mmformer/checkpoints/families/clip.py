"""CLIP as transformers saves it: a tower of pictures, one of texts read causally, or one of the two alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.changes import Reshaped, Rows
from mmformer.checkpoints.families import parts, sizes, texts, towers, vit
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.texts import LAYER as TEXT_LAYER
from mmformer.checkpoints.families.texts import STACK, TABLE, TEXT
from mmformer.checkpoints.families.towers import IMAGE, IMAGE_LAYER, Layers, Pictures
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, Written, join, rename

KINDS = ("clip", "clip_vision_model", "clip_text_model")
SHARED: Config = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
DEFAULTS: dict[str, Config] = {
    "vision": SHARED | {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
        "num_channels": 3,
    },
    "text": SHARED | {
        "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408,
        "max_position_embeddings": 77,
    },
}  # fmt: skip
"""What the config of a tower leaves out that says nothing else."""

SCALE, BIAS = "objectives.contrastive.log_scale", "objectives.contrastive.bias"
IGNORED = {
    "*embeddings.position_ids": "counts places, which needs no tensor",
    "logit_scale": "the temperature of an objective, and none is loaded here",
    "logit_bias": "the bias of an objective, and none is loaded here",
}
INITIAL_SCALE = 1 / 0.07
STARTS = {"image": "vision_model.", "text": "text_model."}
WORDS = {"image": "vision", "text": "text"}
LARGEST = 2
"""An `eos_token_id` by which transformers pools a text at its largest id, as other libraries do always."""


def matches(source: Source) -> bool:
    """`CLIPModel`, or one of its towers."""
    if source.config:
        return source.config.get("model_type") in KINDS
    return source.has("vision_model.pre_layrnorm.weight")


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The towers that the file holds, by its config; `image_size` asks for pictures of another size."""
    if not source.config:
        raise parts.lacks(source, "its config.json")
    starts = tower_starts(source)
    encoders, heads, features, layout = {}, {}, {}, {"starts": starts}
    whole = len(starts) == 2
    if "image" in starts:
        config = tower_config(source, "vision", DEFAULTS["vision"])
        layers, pictures = tower_layers(config), tower_pictures(source, options, config, towers.OPENAI)
        embedder = towers.embedder(layers.dim, pictures, bias=False)
        stack = layers.stack(entry_norm=layers.norm)
        encoders["image"] = parts.encoder(embedder, [stack], parts.part("mmformer.pooling.FirstPool"))
        heads |= _head(source, "image", "visual_projection", layers.dim, whole)
        features |= pictures.features(crop=True)
        layout |= pictures.layout()
    if "text" in starts:
        config = tower_config(source, "text", DEFAULTS["text"])
        layers, length = tower_layers(config), config["max_position_embeddings"]
        encoders["text"] = towers.text_encoder(layers, config["vocab_size"], length, causal=True)
        heads |= _head(source, "text", "text_projection", layers.dim, whole)
        features |= towers.text_features(length)
    return Described(
        model=parts.model(encoders, heads),
        objectives=towers.contrastive("info_nce", INITIAL_SCALE) if whole else {},
        features=features,
        tokenizer=texts.tokenizer(source),
        layout=layout,
    )


def tower_starts(source: Source) -> dict[str, str]:
    """What the names of each tower in the file start with: nothing in the file of one tower alone."""
    kind = source.config.get("model_type", "")
    found = {}
    for modality, name, word in (("image", "vision_model.", "vision"), ("text", "text_model.", "text")):
        alone = kind.endswith(f"_{word}_model")
        if any(key.startswith(name) for key in source.tensors):
            found[modality] = name
        elif alone:
            found[modality] = ""
    return found


def tower_config(source: Source, name: str, defaults: Config) -> Config:
    """The config of a tower: its own in the file of one tower, part of a larger one otherwise.

    Where there is a `*_config_dict` too, as in files of 2022, it is what counts.
    """
    config = source.config
    if config.get("model_type", "").endswith(f"_{name}_model"):
        return defaults | config
    return defaults | (config.get(f"{name}_config_dict") or config.get(f"{name}_config") or {})


def tower_layers(config: Config) -> Layers:
    """The layers of a tower."""
    return Layers(
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        act=config["hidden_act"],
        eps=config["layer_norm_eps"],
    )


def tower_pictures(source: Source, options: Mapping[str, Any], config: Config, colours: Any) -> Pictures:
    """The pictures of a tower."""
    return towers.read_pictures(
        source,
        options,
        size=config["image_size"],
        patch=config["patch_size"],
        channels=config["num_channels"],
        colours=colours,
    )


def _head(source: Source, modality: str, name: str, dim: int, whole: bool) -> dict[str, Config]:
    """The projection, which a whole model has in any case."""
    width = towers.outputs(source, name) or (source.config.get("projection_dim", 512) if whole else None)
    return {modality: towers.unit_head(dim, width)} if width else {}


def rules(described: Described) -> list[Rule]:
    """The table of CLIP in transformers."""
    starts: dict[str, str] = described.layout["starts"]
    found = [*rename("visual_projection", "heads.image.out"), *rename("text_projection", "heads.text.out")]
    if (start := starts.get("image")) is not None:
        embeddings = f"{start}embeddings."
        patches, positions = f"{embeddings}patch_embedding", f"{embeddings}position_embedding.weight"
        cls = f"{embeddings}class_embedding"
        found += [
            Rule((cls,), (f"{IMAGE}.embedder.class_tokens.tokens",), Reshaped((-1,), (1, -1))),
            *towers.embedder_rules(described, patches, positions, own=1, batched=False),
            *rename(f"{start}pre_layrnorm", f"{IMAGE}.stages.0.entry_norm"),
            *layer_rules(IMAGE_LAYER, start),
            *rename(f"{start}post_layernorm", f"{IMAGE}.stages.0.norm"),
        ]
    if (start := starts.get("text")) is not None:
        found += text_rules(start)
    return [*found, Rule(("logit_scale",), (SCALE,))]


def layer_rules(ours: str, start: str) -> list[Rule]:
    """The table of a tower's layers."""
    theirs = start + "encoder.layers.{i}."
    return [
        *join([f"{theirs}self_attn.{name}_proj" for name in "qkv"], f"{ours}.attention.qkv"),
        *towers.layer_rules(ours, theirs, "layer_norm1", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    ]


def text_rules(start: str) -> list[Rule]:
    """The table of the tower of texts, without its projection."""
    return [
        Rule((f"{start}embeddings.token_embedding.weight",), (TABLE,), Rows()),
        Rule((f"{start}embeddings.position_embedding.weight",), (f"{TEXT}.embedder.position.table.weight",), Rows()),
        *layer_rules(TEXT_LAYER, start),
        *rename(f"{start}final_layer_norm", f"{STACK}.norm"),
    ]


def write(model: Mapping[str, Any], base: Written | None) -> Written:
    """The config of transformers for both towers of ours, or for one alone."""
    encoders, heads = model["encoders"], model.get("heads") or {}
    sizes.refuse("transformers' CLIP", **{f"encoder_of_{name}": name not in STARTS for name in encoders})
    config: Config = base.config if base else {}
    written = {name: _WRITERS[name](encoder, _tower_of(config, name)) for name, encoder in encoders.items()}
    width = next(filter(None, map(sizes.outputs, heads.values())), None)
    if len(written) == 2:
        kind = "CLIPModel"
        towers_of = {"vision_config": written["image"], "text_config": written["text"]}
        config = config | {"model_type": "clip", "projection_dim": width} | towers_of
    else:
        ((name, config),) = written.items()
        word = WORDS[name]
        kind = f"CLIP{word.title()}Model{'WithProjection' * bool(heads)}"
        config |= {"model_type": f"clip_{word}_model"} | ({"projection_dim": width} if width else {})
    layout: Config = {"starts": {name: STARTS[name] for name in encoders}}
    files = {}
    if "image" in encoders:
        cells = sizes.cells(encoders["image"])
        layout, files = layout | cells.layout(), vit.written_pictures(cells, base)
    return Written(config=config | {"architectures": [kind]}, layout=layout, files=files)


def _tower_of(config: Config, name: str) -> Config:
    """The config of a tower inside that of the checkpoint, or all of it where that is the tower."""
    word = WORDS[name]
    if config.get("model_type", "").endswith(f"_{word}_model"):
        return config
    return config.get(f"{word}_config_dict") or config.get(f"{word}_config") or {}


def _write_image(encoder: Config, before: Config) -> Config:
    cells = sizes.cells(encoder)
    sizes.refuse(
        "transformers' CLIP",
        tower_of_pictures_without_a_norm_in_front=not sizes.entry(encoder),
        number_of_class_tokens_but_one=cells.tokens != 1,
        bias_of_patches=cells.bias,
    )
    size = before.get("image_size", 224) if before else 0
    size = size if size and cells.fits(size) else cells.size
    cut = {"image_size": size, "patch_size": cells.side, "num_channels": cells.channels}
    return before | _write_layers(sizes.layers(encoder)) | cut


def _write_text(encoder: Config, before: Config) -> Config:
    embedder = encoder["embedder"]
    size = {"vocab_size": embedder["vocab_size"], "max_position_embeddings": embedder["position"]["num_positions"]}
    return {"eos_token_id": LARGEST} | before | _write_layers(sizes.layers(encoder)) | size


def _write_layers(layers: Layers) -> Config:
    sizes.refuse("transformers' CLIP", factor_for_each_channel=layers.scaled)
    return {
        "hidden_size": layers.dim,
        "num_hidden_layers": layers.depth,
        "num_attention_heads": layers.heads,
        "intermediate_size": layers.hidden,
        "hidden_act": layers.act,
        "layer_norm_eps": layers.eps,
    }


_WRITERS = {"image": _write_image, "text": _write_text}


FAMILIES = (
    Family(
        name="clip",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        write=write,
        options=towers.PICTURE_OPTIONS,
        ignored=IGNORED | {"classifier.*": "reads patches in front of the last norm, which no head of this model does"},
        zeros=(BIAS,),
    ),
)
