"""ViT and DeiT as transformers saves them: pictures cut into patches behind a class token, DeiT's behind two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmformer.checkpoints.families import parts, sizes, texts, towers
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.towers import IMAGE, IMAGE_LAYER, Layers
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, Written, join, rename

DEFAULTS: Config = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "pooler_act": "tanh",
}
"""What a config.json leaves out that says nothing else."""

TAUGHT = ("cls_classifier", "distillation_classifier")
OPTIONS = (*towers.PICTURE_OPTIONS, "num_classes")
LABEL = "heads.label"


def matches_vit(source: Source) -> bool:
    """`ViTModel`, or a model around it."""
    return _matches(source, "vit", distilled=False)


def matches_deit(source: Source) -> bool:
    """`DeiTModel`, or a model around it."""
    return _matches(source, "deit", distilled=True)


def _matches(source: Source, kind: str, distilled: bool) -> bool:
    """By what config.json says; without one by the names."""
    if source.config:
        return source.config.get("model_type") == kind
    start = _prefix(source)
    known = source.has(f"{start}embeddings.cls_token", f"{start}encoder.layer.0.layernorm_before.weight")
    return known and source.has(f"{start}embeddings.distillation_token") == distilled


def _prefix(source: Source) -> str:
    return texts.prefix(source, "vit.", "deit.")


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that config.json describes.

    `image_size` asks for pictures of another size, `num_classes` for a new head with so many outputs.
    """
    if not source.config:
        raise parts.lacks(source, "its config.json")
    config, start = DEFAULTS | source.config, _prefix(source)
    pictures = towers.read_pictures(
        source,
        options,
        size=config["image_size"],
        patch=config["patch_size"],
        channels=config["num_channels"],
        colours=towers.HALF,
    )
    layers = Layers(
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        act=config["hidden_act"],
        eps=config["layer_norm_eps"],
        qkv_bias=config["qkv_bias"],
    )
    tokens = 2 if config.get("model_type") == "deit" else 1
    taught = any(towers.outputs(source, name) for name in TAUGHT)
    encoder = parts.encoder(
        towers.embedder(layers.dim, pictures, tokens=tokens), [layers.stack()], class_pool(both=taught)
    )
    heads = label_head(source, options, layers.dim, *(TAUGHT if taught else ("classifier",)))
    if width := towers.outputs(source, f"{start}pooler.dense"):
        act = texts.built(parts.activation(config["pooler_act"]))
        heads["pooler"] = texts.sequence(texts.linear(layers.dim, width), act)
    return Described(
        model=parts.model({"image": encoder}, heads),
        features=pictures.features(crop=tokens == 2),
        layout={"prefix": start, "tokens": tokens, **pictures.layout()},
        **other_classes(options, "classifier.*", "*_classifier.*"),
    )


def class_pool(both: bool = False) -> Config:
    """The class token, or with `both` the class and the distillation token side by side."""
    options = {"count": 2, "joined": True} if both else {}
    return parts.part("mmformer.pooling.FirstPool", **options)


def label_head(source: Source, options: Mapping[str, Any], dim: int, *names: str) -> dict[str, Config]:
    """The classifier of a file, by the name of its last map, with other classes where they are asked for.

    With several names it is the mean of as many, one for each class token. A file without one gets it when asked.
    """
    found = next(filter(None, (towers.outputs(source, name) for name in names)), None)
    classes = options.get("num_classes", found)
    if classes is None:
        return {}
    heads = [texts.linear(dim, classes) for _ in names]
    return {"label": heads[0] if len(heads) == 1 else parts.part("mmformer.heads.MeanHead", parts=heads)}


def other_classes(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """What `Described` says where other classes are asked for than those the file has."""
    if "num_classes" not in options:
        return {}
    reason = "num_classes asks for other classes"
    return {"ignored": dict.fromkeys(names, reason), "new": (f"{LABEL}.*",)}


def label_rules(described: Described, *rules: Rule) -> list[Rule]:
    """The table of a classifier, empty where other classes were asked for."""
    return [] if described.new else list(rules)


def rules(described: Described) -> list[Rule]:
    """The table of ViT and DeiT in transformers."""
    start, tokens = described.layout["prefix"], described.layout["tokens"]
    theirs, embeddings = start + "encoder.layer.{i}.", start + "embeddings."
    names = [f"{embeddings}{name}" for name in ("cls_token", "distillation_token")[:tokens]]
    projection, positions = f"{embeddings}patch_embeddings.projection", f"{embeddings}position_embeddings"
    queries = [f"{theirs}attention.attention.{name}" for name in ("query", "key", "value")]
    return [
        towers.class_rule(*names),
        *towers.embedder_rules(described, projection, positions, own=tokens, batched=True),
        *join(queries, f"{IMAGE_LAYER}.attention.qkv"),
        *towers.layer_rules(
            IMAGE_LAYER, theirs, "layernorm_before", "attention.output.dense", "layernorm_after", "intermediate.dense",
            "output.dense",
        ),
        *rename(f"{start}layernorm", f"{IMAGE}.stages.0.norm"),
        *rename(f"{start}pooler.dense", "heads.pooler.0"),
        *label_rules(
            described,
            *rename("classifier", LABEL),
            *rename(TAUGHT[0], f"{LABEL}.parts.0"),
            *rename(TAUGHT[1], f"{LABEL}.parts.1"),
        ),
    ]  # fmt: skip


def write(model: Mapping[str, Any], base: Written | None) -> Written:
    """The config of transformers for our ViT, with or without a classifier."""
    encoder, heads = model["encoders"]["image"], model.get("heads") or {}
    cells, layers = sizes.cells(encoder), sizes.layers(encoder)
    sizes.refuse(
        "transformers' ViT",
        norm_in_front_of_its_layers=sizes.entry(encoder),
        factor_for_each_channel=layers.scaled,
        picture_without_a_class_token=cells.tokens not in (1, 2),
        patches_without_a_bias=not cells.bias,
    )
    kind, name = ("deit", "DeiT") if cells.tokens == 2 else ("vit", "ViT")
    config = {
        **(base.config if base else {}),
        "model_type": kind,
        "hidden_size": layers.dim,
        "num_hidden_layers": layers.depth,
        "num_attention_heads": layers.heads,
        "intermediate_size": layers.hidden,
        "hidden_act": layers.act,
        "layer_norm_eps": layers.eps,
        "patch_size": cells.side,
        "num_channels": cells.channels,
        "qkv_bias": layers.qkv_bias,
    }
    if not cells.fits(config.get("image_size", cells.size)) or "image_size" not in config:
        config["image_size"] = cells.size
    taught = "parts" in heads.get("label", {})
    if label := heads.get("label"):
        count = sizes.outputs(label["parts"][0] if taught else label)
        if count != len(config.get("id2label") or ()):
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count or 0)}
            config["label2id"] = {name: int(i) for i, name in config["id2label"].items()}
    if pooler := heads.get("pooler"):
        dense, act = pooler["_args_"]
        config |= {"pooler_output_size": dense["out_features"], "pooler_act": sizes.activation(act)}
    ending = "Model" if not label else "ForImageClassification" + "WithTeacher" * taught
    return Written(
        config=config | {"architectures": [f"{name}{ending}"]},
        layout={"prefix": f"{kind}." if label else "", "tokens": cells.tokens, **cells.layout()},
        files=written_pictures(cells, base),
    )


def written_pictures(cells: sizes.Cells, base: Written | None) -> dict[str, Config]:
    """The preprocessor_config.json of a family of transformers: what was there, in the colours and size of now."""
    said = (base.files if base else {}) or {"preprocessor_config.json": {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 3, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True,
        "size": dict(zip(("height", "width"), towers.pair(cells.size), strict=True)),
    }}  # fmt: skip
    colours = {"image_mean": cells.mean, "image_std": cells.std}
    return {
        name: held | colours if {"image_mean", "image_processor_type"} & set(held) else held
        for name, held in said.items()
    }


def _family(name: str, matches: Callable[[Source], bool]) -> Family:
    return Family(
        name=name,
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        write=write,
        options=OPTIONS,
        ignored={
            "*embeddings.mask_token": "stands for hidden patches, which this model does not have",
            "decoder.*": "draws hidden patches, which this model does not do",
        },
    )


FAMILIES = (_family("vit", matches_vit), _family("deit", matches_deit))
