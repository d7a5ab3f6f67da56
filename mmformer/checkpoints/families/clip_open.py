"""CLIP as open_clip and OpenAI save it: fused attention, projections stored (in, out).

open_clip's SigLIP stores its tower of pictures as timm does, inside `visual.trunk`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmformer.checkpoints.changes import Reshaped, Rows, Transposed
from mmformer.checkpoints.families import parts, sizes, texts, towers, vit_timm
from mmformer.checkpoints.families.clip import BIAS, IGNORED, INITIAL_SCALE, SCALE
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.texts import LAYER as TEXT_LAYER
from mmformer.checkpoints.families.texts import STACK, TABLE, TEXT
from mmformer.checkpoints.families.towers import IMAGE, IMAGE_LAYER, Layers
from mmformer.checkpoints.families.vit import class_pool
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, Written, rename

VISION: Config = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224,
    "no_ln_pre": False,
}  # fmt: skip
WORDS: Config = {
    "layers": 12, "width": 512, "heads": 8, "mlp_ratio": 4.0, "context_length": 77, "vocab_size": 49408,
    "no_causal_mask": False, "proj_bias": False, "pool_type": "argmax",
}  # fmt: skip
"""What open_clip's config of a tower leaves out."""

PLAIN: Config = {
    "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False,
    "scale_attn": False, "scale_fc": False, "ls_init_value": None,
}  # fmt: skip
"""Settings of open_clip's layers that have one value here."""

EPS, HEAD_WIDTH, TRUNK = 1e-5, 64, "visual.trunk."
SIZES = ("input_resolution", "context_length", "vocab_size")


def matches_open_clip(source: Source) -> bool:
    """`CLIP` of open_clip, or `CustomTextCLIP` with a tower of pictures of its own or of timm."""
    if source.has(*SIZES):
        return False
    return source.has("visual.class_embedding", "visual.conv1.weight") or source.has(f"{TRUNK}pos_embed", "logit_scale")


def matches_openai(source: Source) -> bool:
    """OpenAI's TorchScript, which says how large its input is."""
    return source.has("visual.class_embedding", *SIZES)


def describe_openai(source: Source, options: Mapping[str, Any]) -> Described:
    """The model by its shapes, as OpenAI's loader reads them: 64 channels a head, and quick_gelu."""
    width, _, patch, _ = towers.shape_of(source, "visual.conv1.weight")
    places, _ = towers.shape_of(source, "visual.positional_embedding")
    context, words = towers.shape_of(source, "positional_embedding")
    model = {
        "embed_dim": towers.shape_of(source, "text_projection")[1],
        "quick_gelu": True,
        "vision_cfg": {
            "width": width,
            "patch_size": patch,
            "image_size": math.isqrt(places - 1) * patch,
            "layers": towers.depth(source, "visual.transformer.resblocks."),
        },
        "text_cfg": {
            "width": words,
            "heads": words // HEAD_WIDTH,
            "context_length": context,
            "layers": towers.depth(source, "transformer.resblocks."),
            "vocab_size": towers.shape_of(source, "token_embedding.weight")[0],
        },
    }
    return describe(source, {**options, "model_cfg": model})


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model by open_clip_config.json, or by the option `model_cfg` with what that file has under this name.

    `image_size` asks for pictures of another size.
    """
    model = options.get("model_cfg") or source.config.get("model_cfg")
    if model is None or not {"embed_dim", "vision_cfg"} <= set(model):
        raise parts.lacks(source, "model_cfg")
    words = WORDS | (model.get("text_cfg") or {})
    texts.refuse(source, words, **PLAIN, hf_model_name=None, embed_cls=False, proj_type="linear")
    if words["pool_type"] == "first":
        raise ValueError(f"{source.origin} reads the first token of a text, which mmformer's CLIP does not")
    encoder, layout, size = _pictures(source, options, model)
    layers = Layers(
        dim=words["width"],
        depth=words["layers"],
        heads=words["heads"],
        hidden=int(words["width"] * words["mlp_ratio"]),
        act=_activation(model, words),
        eps=(words.get("norm_kwargs") or {}).get("eps", EPS),
    )
    width, biased = model["embed_dim"], words["proj_bias"]
    text = towers.text_encoder(layers, words["vocab_size"], words["context_length"], causal=not words["no_causal_mask"])
    projected = None if "timm" in layout and not towers.outputs(source, "visual.head.proj") else width
    pooled = encoder["embedder"]["dim"]
    heads = {"image": towers.unit_head(pooled, projected), "text": towers.unit_head(layers.dim, width, biased)}
    by_pair = source.has("logit_bias")
    return Described(
        model=parts.model({"image": encoder, "text": text}, heads),
        objectives=towers.contrastive("sigmoid" if by_pair else "info_nce", INITIAL_SCALE, -10.0 if by_pair else None),
        features=size | towers.text_features(words["context_length"], pad=words["pool_type"] == "last"),
        tokenizer=texts.tokenizer(source),
        layout={
            **layout,
            "text": texts.prefix(source, "text."),
            "biased": biased,
            "by_pair": by_pair,
            "scalar": source.tensors.shape("logit_scale") if source.has("logit_scale") else (),
        },
    )


def _activation(model: Config, tower: Config) -> str:
    """quick_gelu is a setting of the whole model, the tanh form of GELU one of a tower."""
    if model.get("quick_gelu"):
        return "quick_gelu"
    approximate = (tower.get("act_kwargs") or {}).get("approximate", "none")
    return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[approximate]


def _pictures(source: Source, options: Mapping[str, Any], model: Config) -> tuple[Config, Config, Config]:
    """The encoder of pictures, the layout of its table, and the feature that reads them."""
    tower = VISION | model["vision_cfg"]
    if name := tower.get("timm_model_name"):
        return _trunk(source, options, name)
    texts.refuse(source, tower, **PLAIN, attentional_pool=False, pool_type="tok", pos_embed_type="learnable")
    pictures = towers.read_pictures(
        source, options, size=tower["image_size"], patch=tower["patch_size"], channels=3, colours=towers.OPENAI
    )
    layers = Layers(
        dim=tower["width"],
        depth=tower["layers"],
        heads=tower["width"] // tower["head_width"],
        hidden=int(tower["width"] * tower["mlp_ratio"]),
        act=_activation(model, tower),
        eps=(tower.get("norm_kwargs") or {}).get("eps", EPS),
    )
    entry = {} if tower["no_ln_pre"] else {"entry_norm": layers.norm}
    encoder = parts.encoder(towers.embedder(layers.dim, pictures, bias=False), [layers.stack(**entry)], class_pool())
    return encoder, pictures.layout(), pictures.features(crop=True)


def _trunk(source: Source, options: Mapping[str, Any], name: str) -> tuple[Config, Config, Config]:
    """The same of a tower that timm made, whose name says its size too."""
    said = {key: value for key, value in source.config.items() if key == "preprocess_cfg"}
    config = {"architecture": name, **said}
    inside = replace(source, tensors=source.tensors.without_prefix(TRUNK), config=config)
    known = {key: value for key, value in options.items() if key in towers.PICTURE_OPTIONS}
    described = vit_timm.describe(inside, known)
    return described.model["encoders"]["image"], {"timm": True, **described.layout}, described.features


def rules(described: Described) -> list[Rule]:
    """The table of open_clip, which is OpenAI's too."""
    start, scalar = described.layout["text"], Reshaped(described.layout["scalar"], ())
    projection, head = f"{start}text_projection", "heads.text.out"
    # a linear map where it has a bias, a bare matrix (in, out) otherwise
    projected = rename(projection, head)
    if not described.layout["biased"]:
        projected = [Rule((projection,), (f"{head}.weight",), Transposed())]
    return [
        *(vit_timm.rules(described, TRUNK) if "timm" in described.layout else _picture_rules(described)),
        *rename("visual.head.proj", "heads.image.out"),
        Rule((f"{start}token_embedding.weight",), (TABLE,), Rows()),
        Rule((f"{start}positional_embedding",), (f"{TEXT}.embedder.position.table.weight",), Rows()),
        *_layer_rules(TEXT_LAYER, f"{start}transformer."),
        *rename(f"{start}ln_final", f"{STACK}.norm"),
        *projected,
        Rule(("logit_scale",), (SCALE,), scalar),
        *([Rule(("logit_bias",), (BIAS,), scalar)] if described.layout["by_pair"] else []),
    ]


def _picture_rules(described: Described) -> list[Rule]:
    cls = Rule(("visual.class_embedding",), (f"{IMAGE}.embedder.class_tokens.tokens",), Reshaped((-1,), (1, -1)))
    return [
        cls,
        *towers.embedder_rules(described, "visual.conv1", "visual.positional_embedding", own=1, batched=False),
        *rename("visual.ln_pre", f"{IMAGE}.stages.0.entry_norm"),
        *_layer_rules(IMAGE_LAYER, "visual.transformer."),
        *rename("visual.ln_post", f"{IMAGE}.stages.0.norm"),
        Rule(("visual.proj",), ("heads.image.out.weight",), Transposed()),
    ]


def _layer_rules(ours: str, start: str) -> list[Rule]:
    theirs = start + "resblocks.{i}."
    return [
        *(Rule((f"{theirs}attn.in_proj_{kind}",), (f"{ours}.attention.qkv.{kind}",)) for kind in ("weight", "bias")),
        *towers.layer_rules(ours, theirs, "ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
    ]


def write(model: Mapping[str, Any], base: Written | None) -> Written:
    """open_clip's config for both towers of ours, with their projections."""
    encoders, heads = model["encoders"], model.get("heads") or {}
    sizes.refuse("open_clip", model_of_one_tower=set(encoders) != {"image", "text"})
    cells, image = sizes.cells(encoders["image"]), sizes.layers(encoders["image"])
    if base and base.config:
        config = base.config
        if "timm" not in base.layout and not cells.fits((VISION | config["model_cfg"]["vision_cfg"])["image_size"]):
            tower = config["model_cfg"]["vision_cfg"] | {"image_size": cells.size}
            config = config | {"model_cfg": config["model_cfg"] | {"vision_cfg": tower}}
        return Written(config=_coloured(config, cells), layout={**base.layout, **cells.layout()})
    text, embedder = sizes.layers(encoders["text"]), encoders["text"]["embedder"]
    by_pair = _by_pair(model.get("objectives") or {})
    sizes.refuse(
        "open_clip's CLIP",
        factor_for_each_channel=image.scaled or text.scaled,
        number_of_class_tokens_but_one=cells.tokens != 1,
        bias_of_patches=cells.bias,
        width_that_heads_do_not_divide=image.dim % image.heads > 0,
        quick_gelu_in_one_tower_alone=(image.act == "quick_gelu") != (text.act == "quick_gelu"),
    )
    biased = bool(heads["text"].get("bias"))
    vision_cfg = _write_tower(image) | {
        "image_size": cells.size,
        "head_width": image.dim // image.heads,
        "patch_size": cells.side,
        "no_ln_pre": not sizes.entry(encoders["image"]),
    }
    text_cfg = _write_tower(text) | {
        "heads": text.heads,
        "context_length": embedder["position"]["num_positions"],
        "vocab_size": embedder["vocab_size"],
        "no_causal_mask": not encoders["text"]["stages"][0]["visibility"].get("causal"),
        "proj_bias": biased,
    }
    settings = {
        "embed_dim": sizes.outputs(heads["image"]),
        "quick_gelu": image.act == "quick_gelu",
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
        **({"init_logit_bias": -10.0} if by_pair else {}),
    }
    layout = {"text": "", "biased": biased, "by_pair": by_pair, "scalar": (), **cells.layout()}
    preprocess = {"size": cells.size, "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
    return Written(config=_coloured({"model_cfg": settings, "preprocess_cfg": preprocess}, cells), layout=layout)


def _coloured(config: Config, cells: sizes.Cells) -> Config:
    return config | {"preprocess_cfg": (config.get("preprocess_cfg") or {}) | {"mean": cells.mean, "std": cells.std}}


def _by_pair(objectives: Config) -> bool:
    """Whether the loss is that of SigLIP, which has a bias."""
    return any("sigmoid" in objective["loss"]["_target_"] for objective in objectives.values() if "loss" in objective)


def _write_tower(layers: Layers) -> Config:
    """What the two towers say alike."""
    tower = {"layers": layers.depth, "width": layers.dim, "mlp_ratio": sizes.ratio(layers.hidden, layers.dim)}
    if layers.eps != EPS:
        tower["norm_kwargs"] = {"eps": layers.eps}
    if layers.act == "gelu_pytorch_tanh":
        tower["act_kwargs"] = {"approximate": "tanh"}
    return tower


FAMILIES = (
    Family(
        name="clip",
        library="open_clip",
        matches=matches_open_clip,
        describe=describe,
        rules=rules,
        write=write,
        options=(*towers.PICTURE_OPTIONS, "model_cfg"),
        ignored=IGNORED | {"attn_mask": "the causal mask, which is a rule here", "text.attn_mask": "the causal mask"},
        zeros=(BIAS,),
    ),
    Family(
        name="clip",
        library="openai",
        matches=matches_openai,
        describe=describe_openai,
        rules=rules,
        options=towers.PICTURE_OPTIONS,
        ignored=IGNORED | dict.fromkeys(SIZES, "a size, which the shapes say too"),
        zeros=(BIAS,),
    ),
)
