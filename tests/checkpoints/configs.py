"""Plain configs of small models, as a run would save them."""

from __future__ import annotations

from typing import Any

NAMES = ["apple", "bear", "cat", "dog", "egg", "fig", "goat"]


def model_config(dim: int = 24, num_classes: int = 7) -> dict[str, Any]:
    """A model of three modalities with a head for `random_batch` of tests.helpers; its embedders add positions."""
    attention = {"_target_": "mmformer.nn.Attention", "_partial_": True, "num_heads": 3}
    layer = {"_target_": "mmformer.nn.Block", "_partial_": True, "attention": attention}
    transformer = {"_target_": "mmformer.nn.Transformer", "dim": dim, "depth": 1, "layers": [layer]}
    grid = {"_target_": "mmformer.nn.LearnedGrid", "_partial_": True, "num_positions": 8}
    time = {"_target_": "mmformer.nn.Sinusoid", "_partial_": True}
    embedders = {
        "text": {"_target_": "mmformer.encoders.TextEmbedder", "dim": dim, "vocab_size": 300, "position": time},
        "image": {
            "_target_": "mmformer.encoders.image_patches",
            "dim": dim, "patch": 4, "channels": 3, "position": grid,
        },
        "audio": {
            "_target_": "mmformer.encoders.mel_patches",
            "dim": dim, "num_mels": 5, "frames": 4, "position": time,
        },
    }  # fmt: skip
    return {
        "_target_": "mmformer.model.Model",
        "encoders": {
            name: {"_target_": "mmformer.encoders.Encoder", "embedder": part} for name, part in embedders.items()
        },
        "fusion": {
            "_target_": "mmformer.fusion.Fusion",
            "dim": dim,
            "stream": ["latent", "image", "audio", "text"],
            "num_latents": 1,
            "transformer": transformer,
            "pool": {"_target_": "mmformer.pooling.MeanPool", "modalities": ["latent"]},
        },
        "heads": {"label": {"_target_": "mmformer.heads.Head", "dim": dim, "num_outputs": num_classes}},
    }


FEATURES = {
    "text": {"_target_": "mmformer.datasets.features.Text", "_partial_": True, "max_length": 40},
    "image": {"_target_": "mmformer.datasets.features.Picture", "short": 12, "longest": 24, "multiple": 4},
    "audio": {
        "_target_": "mmformer.datasets.features.LogMel",
        "waveform": {"_target_": "mmformer.datasets.features.Waveform", "sample_rate": 4000, "max_seconds": 5.0},
        "num_mels": 5, "window": 100, "hop": 50, "multiple": 4,
    },
}  # fmt: skip


def run_config(**model: Any) -> dict[str, Any]:
    """The config of a classifier, with the facts of its data."""
    classes = {"_target_": "mmformer.objectives.Classes", "head": "label", "target": "label"}
    return {
        "model": model_config(**model),
        "objectives": {"label": classes},
        "facts": {"targets": {"label": {"kind": "Classes", "names": NAMES}}},
        "features": FEATURES,
    }
