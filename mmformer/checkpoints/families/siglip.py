"""SigLIP as transformers saves it, SigLIP2 of a fixed size too: both towers see all, pairs are judged one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.changes import Reshaped, Split
from mmformer.checkpoints.families import clip, parts, texts, towers
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.towers import IMAGE, IMAGE_LAYER
from mmformer.checkpoints.families.vit import LABEL, label_head, label_rules, other_classes
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, rename

KINDS = ("siglip", "siglip_vision_model", "siglip_text_model")
SHARED: Config = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
DEFAULTS: dict[str, Config] = {
    "vision": SHARED | {"image_size": 224, "patch_size": 16, "num_channels": 3, "vision_use_head": True},
    "text": SHARED | {"vocab_size": 32000, "max_position_embeddings": 64},
}
"""What the config of a tower leaves out that says nothing else."""

INITIAL_SCALE, INITIAL_BIAS = 10.0, -10.0
POOL = f"{IMAGE}.pool"
MEAN = {"vision_model.head.*": "a classifier reads the mean of the patches, which this pool does not give"}


def matches(source: Source) -> bool:
    """`SiglipModel`, or one of its towers."""
    if source.config:
        return source.config.get("model_type") in KINDS
    return source.has("vision_model.head.probe") or source.has("text_model.head.weight", "logit_bias")


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The towers that the file holds, by its config; options as for transformers' ViT.

    A text is to be padded to the whole length, as the last place is read and the padding is seen.
    """
    if not source.config:
        raise parts.lacks(source, "its config.json")
    starts, asked = clip.tower_starts(source), other_classes(options, "classifier.*")
    sorts = towers.outputs(source, "classifier") is not None
    encoders, heads, features, layout = {}, {}, {}, {"starts": starts}
    if "image" in starts:
        config = clip.tower_config(source, "vision", DEFAULTS["vision"])
        layers, pictures = clip.tower_layers(config), clip.tower_pictures(source, options, config, towers.HALF)
        pools = config["vision_use_head"] and not sorts
        encoders["image"] = parts.encoder(
            towers.embedder(layers.dim, pictures, tokens=0),
            [layers.stack()],
            layers.attention_pool() if pools else parts.part("mmformer.pooling.MeanPool"),
        )
        heads = label_head(source, options, layers.dim, "classifier")
        heads |= {"image": towers.unit_head(layers.dim, None)} if pools else {}
        features |= pictures.features(crop=False)
        layout |= pictures.layout()
    if "text" in starts:
        config = clip.tower_config(source, "text", DEFAULTS["text"])
        layers, length = clip.tower_layers(config), config["max_position_embeddings"]
        width = towers.outputs(source, f"{starts['text']}head") or config.get("projection_size") or layers.dim
        encoders["text"] = towers.text_encoder(layers, config["vocab_size"], length, causal=False)
        heads["text"] = towers.unit_head(layers.dim, width, bias=True)
        features |= towers.text_features(length, pad=True)
    return Described(
        model=parts.model(encoders, heads),
        objectives=towers.contrastive("sigmoid", INITIAL_SCALE, INITIAL_BIAS) if len(starts) == 2 else {},
        features=features,
        tokenizer=texts.tokenizer(source),
        layout=layout,
        new=asked.get("new", ()),
        ignored=asked.get("ignored", {}) | (MEAN if sorts else {}),
    )


def rules(described: Described) -> list[Rule]:
    """The table of SigLIP in transformers."""
    starts: dict[str, str] = described.layout["starts"]
    scalar = Reshaped((1,), ())
    found = [Rule(("logit_scale",), (clip.SCALE,), scalar), Rule(("logit_bias",), (clip.BIAS,), scalar)]
    if (start := starts.get("image")) is not None:
        patches, positions = f"{start}embeddings.patch_embedding", f"{start}embeddings.position_embedding.weight"
        found += [
            *towers.embedder_rules(described, patches, positions, own=0, batched=False),
            *clip.layer_rules(IMAGE_LAYER, start),
            *rename(f"{start}post_layernorm", f"{IMAGE}.stages.0.norm"),
            *_pool_rules(f"{start}head."),
        ]
    if (start := starts.get("text")) is not None:
        found += [*clip.text_rules(start), *rename(f"{start}head", "heads.text.out")]
    return [*found, *label_rules(described, *rename("classifier", LABEL))]


def _pool_rules(theirs: str) -> list[Rule]:
    """The table of the pool, whose query, key and value maps are one in the file and two here."""
    attention = f"{POOL}.attention"
    return [
        Rule((f"{theirs}probe",), (f"{POOL}.query",), towers.PROBE),
        *(
            Rule(
                (f"{theirs}attention.in_proj_{kind}",),
                (f"{attention}.query.{kind}", f"{attention}.key_value.{kind}"),
                Split((1, 2)),
            )
            for kind in ("weight", "bias")
        ),
        *rename(f"{theirs}attention.out_proj", f"{attention}.out"),
        *rename(f"{theirs}layernorm", f"{POOL}.norm"),
        *rename(f"{theirs}mlp.fc1", f"{POOL}.feedforward.up"),
        *rename(f"{theirs}mlp.fc2", f"{POOL}.feedforward.down"),
    ]


FAMILIES = (
    Family(
        name="siglip",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        options=(*towers.PICTURE_OPTIONS, "num_classes"),
        ignored=clip.IGNORED,
    ),
)
