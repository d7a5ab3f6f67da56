"""A family as small as one can be, for the laws of the engine: a ViT of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmformer.checkpoints.build import build
from mmformer.checkpoints.changes import ConvolutionPatches, GridPositions, Reshaped, Rows
from mmformer.checkpoints.families import parts
from mmformer.checkpoints.plan import original
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, join, rename
from tests.checkpoints.oracles import scramble

CONFIG: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 20,
    "patch_size": 4, "num_labels": 7,
}  # fmt: skip
IMAGE = "encoders.image"
LAYER = IMAGE + ".stages.0.layers.{i}"
THEIRS = "vit.encoder.layer.{i}."


def matches(source: Source) -> bool:
    return source.has("vit.embeddings.cls_token")


def describe(source: Source, options) -> Described:
    if not source.config:
        raise parts.lacks(source, "num_attention_heads")
    return described(source.config | dict(options))


def described(config: dict[str, Any]) -> Described:
    dim, patch = config["hidden_size"], config["patch_size"]
    side = config["image_size"] // patch
    layer = parts.block(
        attention=parts.attention(config["num_attention_heads"]),
        feedforward=parts.feedforward(dim, config["intermediate_size"], "gelu"),
    )
    embedder = parts.part(
        "mmformer.encoders.image_patches",
        dim=dim, patch=patch, channels=3,
        position=parts.factory("mmformer.nn.GridTable", rows=side, columns=side),
        class_tokens=parts.factory("mmformer.encoders.ClassTokens", count=1, positions=True),
    )  # fmt: skip
    encoder = parts.encoder(embedder, [parts.transformer(dim, config["num_hidden_layers"], [layer])])
    head = parts.part("torch.nn.Linear", in_features=dim, out_features=config["num_labels"])
    return Described(model=parts.model({"image": encoder}, {"label": head}), layout={"patch": patch})


def rules(described: Described) -> list[Rule]:
    patch = described.layout["patch"]
    embeddings, embedder = "vit.embeddings.", f"{IMAGE}.embedder."
    projection = embeddings + "patch_embeddings.projection."
    queries = [THEIRS + f"attention.attention.{name}" for name in ("query", "key", "value")]
    return [
        Rule((embeddings + "cls_token",), (embedder + "class_tokens.tokens",), Reshaped((1, 1, -1), (1, -1))),
        Rule(
            (embeddings + "position_embeddings",),
            (embedder + "class_tokens.positions", embedder + "position.table"),
            GridPositions(num_class=1),
        ),
        Rule((projection + "weight",), (embedder + "stem.linear.weight",), ConvolutionPatches((patch, patch))),
        Rule((projection + "bias",), (embedder + "stem.linear.bias",)),
        *rename(THEIRS + "layernorm_before", f"{LAYER}.attention_norm"),
        *join(queries, f"{LAYER}.attention.qkv"),
        *rename(THEIRS + "attention.output.dense", f"{LAYER}.attention.out"),
        *rename(THEIRS + "layernorm_after", f"{LAYER}.feedforward_norm"),
        *rename(THEIRS + "intermediate.dense", f"{LAYER}.feedforward.up"),
        *rename(THEIRS + "output.dense", f"{LAYER}.feedforward.down"),
        *rename("vit.layernorm", f"{IMAGE}.stages.0.norm"),
        *rename("classifier", "heads.label", Rows()),
    ]


FAMILY = Family(
    name="toy", library="tests", matches=matches, describe=describe, rules=rules, options=("image_size", "num_labels")
)


def tensors(**config: Any) -> dict[str, Tensor]:
    """A file of the family, made from a scrambled model of our own by the table read backwards."""
    found = described(CONFIG | config)
    return original(scramble(build(found.model)).state_dict(), rules(found))
