"""What files of Salesforce's own code share (ALBEF, BLIP, LAVIS): no config, timm's names for pictures, training state.

Sizes are read off the tensors; `num_heads` and `text_heads` give those of heads that have not 64 channels each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmformer.checkpoints.changes import Change, Given, Tensors
from mmformer.checkpoints.families import clip, crossing, parts, towers
from mmformer.checkpoints.families.bert import IGNORED as BUFFERS
from mmformer.checkpoints.families.crossing import FIRST
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.towers import Layers, Pictures
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Rule

VISUAL = "visual_encoder."
OPTIONS = (*towers.PICTURE_OPTIONS, "num_heads", "text_heads")

MOMENTUM = "the momentum copy of the training, which a new training makes of the weights"
QUEUE = "a queue of the training's last samples"
IGNORED = {
    **dict.fromkeys(
        ("visual_encoder_m.*", "text_encoder_m.*", "text_decoder_m.*", "vision_proj_m.*", "text_proj_m.*"), MOMENTUM
    ),
    **dict.fromkeys(("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue"), QUEUE),
    **BUFFERS,
}


@dataclass(frozen=True)
class Temperature(Change):
    """What similarities are divided by, as the logarithm of what they are multiplied by; back but for the last bits."""

    verb = "computed"

    def load(self, tensors: Given) -> Tensors:
        return tuple(-tensor.log() for tensor in tensors if tensor is not None)

    def save(self, tensors: Tensors) -> Tensors:
        return tuple((-tensor.double()).exp().to(tensor.dtype) for tensor in tensors)


TEMPERATURE = Rule(("temp",), (clip.SCALE,), Temperature())


@dataclass(frozen=True)
class Tower:
    """The encoder of pictures: its config, its width, and how pictures are read."""

    encoder: Config
    dim: int
    pictures: Pictures


def tower(
    source: Source,
    options: Mapping[str, Any],
    colours: Any,
    *,
    heads: int | None = None,
    norm_eps: float = 1e-6,
) -> Tower:
    """The ViT of a file, by its tensors; `norm_eps` is that of the norm behind its last layer.

    Raises:
        ValueError: a width whose heads are not known.
    """
    dim, channels, *patch = towers.shape_of(source, f"{VISUAL}patch_embed.proj.weight")
    side = math.isqrt(towers.shape_of(source, f"{VISUAL}pos_embed")[1] - 1)
    pictures = towers.read_pictures(
        source,
        options,
        size=[side * patch[0], side * patch[1]],
        patch=patch,
        channels=channels,
        colours=colours,
    )
    layers = Layers(
        dim=dim,
        depth=towers.depth(source, f"{VISUAL}blocks."),
        heads=options.get("num_heads", heads) or crossing.heads_of(source, dim, "num_heads"),
        hidden=towers.shape_of(source, f"{VISUAL}blocks.0.mlp.fc1.weight")[0],
        act="gelu",
        eps=1e-6,
    )
    stack = layers.stack() | {"norm": parts.layer_norm(norm_eps)}
    return Tower(parts.encoder(towers.embedder(dim, pictures), [stack], FIRST), dim, pictures)


def layout(pictures: Pictures) -> dict[str, Any]:
    """What timm's table must know."""
    return {"tokens": 1, "own": 1, "scaled": False, **pictures.layout()}


def contrastive(source: Source) -> dict[str, Config]:
    """The objective that pictures and texts were trained with, where the file has its temperature."""
    return towers.contrastive("info_nce", clip.INITIAL_SCALE) if source.has("temp") else {}
