"""ViT, DeiT and the picture towers of CLIP and SigLIP as timm saves them.

What a state dict does not say (heads, non-linearity, epsilon) follows from the name of the architecture, which
config.json has, and from the arguments that timm writes beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.families import parts, sizes, towers
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.towers import IMAGE, IMAGE_LAYER, Layers, Pictures
from mmformer.checkpoints.families.vit import LABEL, class_pool, label_head, label_rules, other_classes
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, Written, rename

HEADS = {192: 3, 256: 4, 384: 6, 512: 8, 640: 10, 768: 12, 896: 14} | dict.fromkeys(
    (1024, 1152, 1280, 1408, 1536, 1664), 16
)
"""Heads of timm's named architectures by width; of `vit_base_patch16_gap_224` not, which has 16."""

KNOWN = re.compile(r"(vit|deit3?)_(?!.*_(gap|dinov2|reg\d|rpn|xp|radio_v\d))[a-z0-9]+(_.*)?|vit_\w+_siglip_gap_\d+")
TANH = re.compile(r"vit_(base_patch32|giantopt_patch16|so400m_patch16)_siglip.*|vit_large_patch16_siglip_(gap_)?512")
"""SigLIP's towers that timm computes with the tanh form of GELU; the others have the exact one there."""

UNDERSTOOD = {
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads", "mlp_ratio",
    "qkv_bias", "init_values", "class_token", "no_embed_class", "pre_norm",
}  # fmt: skip
"""Arguments of timm's `VisionTransformer` that the tensors show, or that are read here."""


def matches(source: Source) -> bool:
    """A `VisionTransformer` of timm: fused attention, patches cut by one convolution."""
    return source.has("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight")


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that the tensors, the architecture's name and its arguments describe.

    `architecture` gives a bare file the name, `num_heads`, `activation` and `norm_eps` what an unknown name leaves
    open; other options as for transformers' ViT.
    """
    _check(source)
    pictures, layers = _pictures(source, options), _layers(source, options)
    tokens = source.has("cls_token") + source.has("dist_token")
    own = towers.shape_of(source, "pos_embed")[1] - math.prod(pictures.layout()["grid"])
    normed = towers.outputs(source, "norm_pre") is not None  # CLIP's towers: patches without a bias, and a norm behind
    pool = class_pool(both=tokens == 2) if tokens else parts.part("mmformer.pooling.MeanPool")
    if source.has("attn_pool.latent"):
        pool = layers.attention_pool()
    embedder = towers.embedder(layers.dim, pictures, bias=not normed, tokens=tokens, positions=own > 0)
    stack = layers.stack(**({"entry_norm": layers.norm} if normed else {}))
    heads = label_head(source, options, layers.dim, *("head", "head_dist")[: max(1, tokens)])
    return Described(
        model=parts.model({"image": parts.encoder(embedder, [stack], pool)}, heads),
        features=pictures.features(crop="siglip" not in _name(source, options)),
        layout={"tokens": tokens, "own": own, "scaled": layers.scaled, **pictures.layout()},
        **other_classes(options, "head.*", "head_dist.*"),
    )


def _name(source: Source, options: Mapping[str, Any]) -> str:
    """The name of the architecture, without the tag of its weights."""
    return str(options.get("architecture", source.config.get("architecture", ""))).split(".")[0]


def _arguments(source: Source) -> Config:
    """What the architecture was called with.

    Raises:
        ValueError: an argument whose effect the tensors do not show.
    """
    arguments = source.config.get("model_args") or {}
    if unknown := sorted(set(arguments) - UNDERSTOOD):
        raise ValueError(f"{source.origin} was made with {', '.join(unknown)}, which mmformer's ViT does not have: "
                         "wrap the model instead (mmformer.encoders.wrap.Timm)")  # fmt: skip
    return arguments


def _check(source: Source) -> None:
    """Stop at pools that read something else than the described model would."""
    pool = source.config.get("global_pool", "token" if source.has("cls_token") else "avg")
    if source.has("fc_norm.weight") or (pool in ("avg", "avgmax", "max") and source.has("cls_token")):
        raise ValueError(f"{source.origin} pools by {pool!r} over patches and normalises behind, which mmformer's ViT "
                         "does not: wrap the model instead (mmformer.encoders.wrap.Timm)")  # fmt: skip


def _pictures(source: Source, options: Mapping[str, Any]) -> Pictures:
    """The pictures by the file's pretrained_cfg; a file without one has square ones."""
    _, channels, *patch = towers.shape_of(source, "patch_embed.proj.weight")
    places = towers.shape_of(source, "pos_embed")[1]
    trained = source.config.get("pretrained_cfg") or {}
    size = _arguments(source).get("img_size") or trained.get("input_size", [])[1:]
    if not size:
        kinds = source.has("cls_token") + source.has("dist_token")
        cells = places if math.isqrt(places) ** 2 == places else places - kinds
        size = [math.isqrt(cells) * patch[0], math.isqrt(cells) * patch[1]]
    return towers.read_pictures(
        source,
        options,
        size=size,
        patch=patch,
        channels=channels,
        colours=_colours(_name(source, options)),
    )


def _colours(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if name.startswith("deit"):
        return towers.IMAGENET
    return towers.OPENAI if "_clip_" in name else towers.HALF


def _layers(source: Source, options: Mapping[str, Any]) -> Layers:
    """The layers, by the name of the architecture where the options do not say.

    Raises:
        ValueError: a name that does not say how many heads, and no option that does.
    """
    name = _name(source, options)
    hidden, dim = towers.shape_of(source, "blocks.0.mlp.fc1.weight")
    known = HEADS.get(dim) if KNOWN.fullmatch(name) else None
    heads = options.get("num_heads", _arguments(source).get("num_heads", known))
    if heads is None:
        raise parts.lacks(source, "num_heads")
    if not name and source.has("norm_pre.weight") and not {"activation", "norm_eps"} <= set(options):
        raise parts.lacks(source, "architecture")  # CLIP's towers differ in what tensors do not show
    act = "quick_gelu" if "quickgelu" in name else "gelu_pytorch_tanh" if TANH.fullmatch(name) else "gelu"
    return Layers(
        dim=dim,
        depth=towers.depth(source, "blocks."),
        heads=heads,
        hidden=hidden,
        act=options.get("activation", act),
        eps=options.get("norm_eps", 1e-5 if "_clip_" in name else 1e-6),
        qkv_bias=source.has("blocks.0.attn.qkv.bias"),
        scaled=source.has("blocks.0.ls1.gamma"),
    )


def rules(described: Described, prefix: str = "") -> list[Rule]:
    """The table of timm's ViT, behind the `prefix` that it has inside another model."""
    layout = described.layout
    theirs, pool, ours = prefix + "blocks.{i}.", f"{prefix}attn_pool.", f"{IMAGE}.pool"
    names = [f"{prefix}{name}" for name in ("cls_token", "dist_token")[: layout["tokens"]]]
    attention, feedforward = f"{IMAGE_LAYER}.attention", f"{IMAGE_LAYER}.feedforward"
    scaled = [
        Rule((f"{theirs}ls1.gamma",), (f"{attention}.scale",)),
        Rule((f"{theirs}ls2.gamma",), (f"{feedforward}.scale",)),
    ]
    return [
        *([towers.class_rule(*names)] if names else []),
        *towers.embedder_rules(
            described, f"{prefix}patch_embed.proj", f"{prefix}pos_embed", own=layout["own"], batched=True
        ),
        *rename(f"{prefix}norm_pre", f"{IMAGE}.stages.0.entry_norm"),
        *rename(theirs + "attn.qkv", f"{attention}.part.qkv" if layout["scaled"] else f"{attention}.qkv"),
        *towers.layer_rules(
            IMAGE_LAYER, theirs, "norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2", scaled=layout["scaled"]
        ),
        *(scaled if layout["scaled"] else []),
        *rename(f"{prefix}norm", f"{IMAGE}.stages.0.norm"),
        Rule((f"{pool}latent",), (f"{ours}.query",), towers.PROBE),
        *rename(f"{pool}q", f"{ours}.attention.query"),
        *rename(f"{pool}kv", f"{ours}.attention.key_value"),
        *rename(f"{pool}proj", f"{ours}.attention.out"),
        *rename(f"{pool}norm", f"{ours}.norm"),
        *rename(f"{pool}mlp.fc1", f"{ours}.feedforward.up"),
        *rename(f"{pool}mlp.fc2", f"{ours}.feedforward.down"),
        *label_rules(
            described,
            *(rename("head", f"{LABEL}.parts.0") if layout["tokens"] == 2 else rename("head", LABEL)),
            *rename("head_dist", f"{LABEL}.parts.1"),
        ),
    ]


def write(model: Mapping[str, Any], base: Written | None) -> Written:
    """timm's config for our ViT, with or without a classifier; another size or classes than those it came with too."""
    encoder, heads = model["encoders"]["image"], model.get("heads") or {}
    cells, layers = sizes.cells(encoder), sizes.layers(encoder)
    label = heads.get("label")
    count = sizes.outputs(label["parts"][0] if "parts" in label else label) if label else 0
    config = _renewed(base, cells) if base and base.config else _named(encoder, cells, layers)
    layout = base.layout if base else {"tokens": cells.tokens, "own": cells.tokens, "scaled": layers.scaled}
    trained = config["pretrained_cfg"] | {"mean": cells.mean, "std": cells.std, "num_classes": count}
    return Written(
        config=config | {"num_classes": count, "num_features": layers.dim, "pretrained_cfg": trained},
        layout={**layout, **cells.layout()},
    )


def _renewed(base: Written, cells: sizes.Cells) -> Config:
    """The config that a model came with, for pictures of its size now."""
    config, trained = base.config, dict(base.config.get("pretrained_cfg") or {})
    arguments = dict(config.get("model_args") or {})
    if not cells.fits(arguments.get("img_size") or trained.get("input_size", [3, 0, 0])[1:]):
        arguments["img_size"] = cells.size
        trained["input_size"] = [cells.channels, *towers.pair(cells.size)]
    return config | {"pretrained_cfg": trained, "model_args": arguments}


def _named(encoder: Config, cells: sizes.Cells, layers: Layers) -> Config:
    """An architecture of timm with the epsilon and the non-linearity of ours, and its sizes as arguments."""
    normed = sizes.entry(encoder)
    clip = f"vit_base_patch16_clip{'_quickgelu' * (layers.act == 'quick_gelu')}_224"
    plain = "deit_base_distilled_patch16_224" if cells.tokens == 2 else "vit_base_patch16_224"
    sizes.refuse(
        "timm's ViT",
        picture_without_a_class_token=cells.tokens == 0,
        **{f"activation_{layers.act}_there": layers.act not in (("gelu", "quick_gelu") if normed else ("gelu",))},
    )
    arguments = {
        "img_size": cells.size,
        "patch_size": cells.side,
        "in_chans": cells.channels,
        "embed_dim": layers.dim,
        "depth": layers.depth,
        "num_heads": layers.heads,
        "mlp_ratio": sizes.ratio(layers.hidden, layers.dim),
        "qkv_bias": layers.qkv_bias,
        **({"init_values": 1e-6} if layers.scaled else {}),
    }
    trained = {
        "input_size": [cells.channels, *towers.pair(cells.size)],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    return {
        "architecture": clip if normed else plain,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": trained,
    }


FAMILIES = (
    Family(
        name="vit",
        library="timm",
        matches=matches,
        describe=describe,
        rules=rules,
        write=write,
        options=(*towers.PICTURE_OPTIONS, "architecture", "num_heads", "activation", "norm_eps", "num_classes"),
    ),
)
