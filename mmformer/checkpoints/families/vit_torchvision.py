"""ViT as torchvision saves it: a bare file, which does not say how many heads its attention has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.families import parts, texts, towers
from mmformer.checkpoints.families.towers import IMAGE, IMAGE_LAYER, Layers
from mmformer.checkpoints.families.vit import LABEL, class_pool, label_head, label_rules, other_classes
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, rename

EPS = 1e-6


def matches(source: Source) -> bool:
    """A `VisionTransformer` of torchvision, cut by one convolution."""
    return source.has("class_token", "conv_proj.weight", "encoder.pos_embedding")


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that the tensors describe; `num_heads` must be given, other options as for transformers' ViT."""
    if "num_heads" not in options:
        raise parts.lacks(source, "num_heads")
    dim, channels, *patch = towers.shape_of(source, "conv_proj.weight")
    side = math.isqrt(towers.shape_of(source, "encoder.pos_embedding")[1] - 1) * patch[0]
    pictures = towers.read_pictures(source, options, size=side, patch=patch, channels=channels, colours=towers.IMAGENET)
    layers = Layers(
        dim=dim,
        depth=towers.depth(source, "encoder.layers.encoder_layer_"),
        heads=options["num_heads"],
        hidden=towers.shape_of(source, f"encoder.layers.encoder_layer_0.{_mlp(source)[0]}.weight")[0],
        act="gelu",
        eps=EPS,
    )
    encoder = parts.encoder(towers.embedder(dim, pictures), [layers.stack()], class_pool())
    hidden = towers.outputs(source, "heads.pre_logits")
    heads = label_head(source, options, hidden or dim, "heads.head")
    if hidden and heads:
        heads = {"label": texts.sequence(texts.linear(dim, hidden), parts.part("torch.nn.Tanh"), heads["label"])}
    return Described(
        model=parts.model({"image": encoder}, heads),
        features=pictures.features(crop=True),
        layout={"mlp": _mlp(source), **pictures.layout()},
        **other_classes(options, "heads.*"),
    )


def _mlp(source: Source) -> tuple[str, str]:
    """The names of a feed-forward map: torchvision's published files have those of its first version."""
    old = source.has("encoder.layers.encoder_layer_0.mlp.linear_1.weight")
    return ("mlp.linear_1", "mlp.linear_2") if old else ("mlp.0", "mlp.3")


def rules(described: Described) -> list[Rule]:
    """The table of torchvision's ViT."""
    theirs, attention = "encoder.layers.encoder_layer_{i}.", "encoder.layers.encoder_layer_{i}.self_attention."
    return [
        towers.class_rule("class_token"),
        *towers.embedder_rules(described, "conv_proj", "encoder.pos_embedding", own=1, batched=True),
        *(
            Rule((f"{attention}in_proj_{kind}",), (f"{IMAGE_LAYER}.attention.qkv.{kind}",))
            for kind in ("weight", "bias")
        ),
        *towers.layer_rules(IMAGE_LAYER, theirs, "ln_1", "self_attention.out_proj", "ln_2", *described.layout["mlp"]),
        *rename("encoder.ln", f"{IMAGE}.stages.0.norm"),
        *label_rules(
            described,
            *rename("heads.head", LABEL),
            *rename("heads.pre_logits", f"{LABEL}.0"),
            *rename("heads.head", f"{LABEL}.2"),
        ),
    ]


FAMILIES = (
    Family(
        name="vit",
        library="torchvision",
        matches=matches,
        describe=describe,
        rules=rules,
        options=(*towers.PICTURE_OPTIONS, "num_heads", "num_classes"),
    ),
)
