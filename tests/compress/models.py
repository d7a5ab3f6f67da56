"""A small tri-modal model by its plain config, with every kind of part that can be cut, and some that cannot."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from mmformer.batch import Batch
from mmformer.checkpoints import SavedModel, build
from mmformer.objectives import Classes
from tests.helpers import random_batch, scramble

DIM = 24


def block(**parts: Any) -> dict[str, Any]:
    return {"_target_": "mmformer.nn.Block", "_partial_": True, **parts}


def attention(kind: str = "Attention", **options: Any) -> dict[str, Any]:
    return {"_target_": f"mmformer.nn.{kind}", "_partial_": True, **options}


def transformer(depth: int, *layers: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": "mmformer.nn.Transformer", "dim": DIM, "depth": depth, "layers": list(layers)}


def encoder(embedder: dict[str, Any], *stages: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": "mmformer.encoders.Encoder", "embedder": embedder, "stages": list(stages)}


SELF = block(attention=attention(num_heads=2, rotary={"_target_": "mmformer.nn.Rotary", "_partial_": True}))
GATED = {"_target_": "mmformer.nn.FeedForward", "_partial_": True, "gated": True, "bias": False, "expansion": 2.0}
SCALED = {"_target_": "mmformer.nn.Scaled", "_partial_": True, "part": GATED, "initial": 0.5}
TEXTS = block(attention=attention(num_heads=2), feedforward=SCALED, post_norm=True)
LOOKING = block(
    attention=attention(num_heads=4, num_kv_heads=2),
    cross=attention("CrossAttention", num_heads=2),
    feedforward={"_target_": "mmformer.nn.FeedForward", "_partial_": True, "expansion": 1.5},
)
CONFIG: dict[str, Any] = {
    "_target_": "mmformer.model.Model",
    "encoders": {
        "text": encoder(
            {"_target_": "mmformer.encoders.TextEmbedder", "dim": DIM, "vocab_size": 50,
             "position": {"_target_": "mmformer.nn.Sinusoid", "_partial_": True}},
            transformer(1, TEXTS),
        ),
        "image": encoder(
            {"_target_": "mmformer.encoders.image_patches", "dim": DIM, "patch": 4, "channels": 3}, transformer(2, SELF)
        ),
        "audio": encoder(
            {"_target_": "mmformer.encoders.mel_patches", "dim": DIM, "num_mels": 5, "frames": 4}, transformer(1, TEXTS)
        ),
    },
    "fusion": {
        "_target_": "mmformer.fusion.Fusion",
        "dim": DIM,
        "stream": ["latent", "text"],
        "context": ["image", "audio"],
        "num_latents": 1,
        "transformer": transformer(2, LOOKING),
        "pool": {"_target_": "mmformer.pooling.MeanPool", "modalities": ["latent"]},
    },
    "heads": {
        "answer": {"_target_": "mmformer.heads.Head", "dim": DIM, "num_outputs": 7},
        "picture": {"_target_": "mmformer.heads.Head", "dim": DIM, "num_outputs": 7},
    },
}  # fmt: skip


def saved_model(seed: int = 0, **changes: Any) -> SavedModel:
    """The model, all parameters random, as `load_model` gives it."""
    config = {**deepcopy(CONFIG), **changes}
    parts = {
        "answer": {"_target_": "mmformer.objectives.Classes", "head": "answer", "target": "label"},
        "picture": {"_target_": "mmformer.objectives.Classes", "head": "picture", "target": "label", "source": "image"},
    }
    objectives = {name: Classes(**{k: v for k, v in part.items() if k != "_target_"}) for name, part in parts.items()}
    model = build(config)
    scramble(model, seed)
    whole = {"model": config, "objectives": parts, "facts": {"special_ids": [0, 1]}}
    return SavedModel(model=model.eval(), objectives=dict(objectives), config=whole)


def batch_of(size: int, seed: int = 0, **options: Any) -> Batch:
    """Samples with any subset of the modalities in turn, and a label each."""
    return random_batch(size, seed, **options)
