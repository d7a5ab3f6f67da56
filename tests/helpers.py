"""Random token sequences, batches and small models for the laws."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from mmformer.batch import Batch, Ragged
from mmformer.encoders import Encoder, TextEmbedder, image_patches, mel_patches
from mmformer.fusion import Fusion
from mmformer.heads import Head
from mmformer.model import Model
from mmformer.nn import Attention, Block, CrossAttention, LearnedGrid, Rotary, Sinusoid, Transformer
from mmformer.pooling import MeanPool
from mmformer.tokens import Layout, Tokens, modality_id, segments


def scramble(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def packed_tokens(lengths: dict[int, int], num_samples: int, dim: int, modality: str = "text", seed: int = 0) -> Tokens:
    """Packed tokens: sample -> length, in the given order; time counts up within each."""
    generator = torch.Generator().manual_seed(seed)
    layout = Layout(tuple(lengths), tuple(lengths.values()), num_samples)
    position = torch.zeros(1, layout.total, 3, dtype=torch.long)
    position[0, :, 0] = torch.cat([torch.arange(n) for n in lengths.values()] or [torch.arange(0)])
    return Tokens(
        x=torch.randn(1, layout.total, dim, generator=generator),
        modality=torch.full((1, layout.total), modality_id(modality)),
        position=position,
        segment=segments(layout, layout.total, torch.device("cpu")),
        layout=layout,
    )


SUBSETS = [("text",), ("image",), ("audio",), ("text", "image"), ("text", "audio"), ("image", "audio"),
           ("text", "image", "audio")]  # fmt: skip


def random_batch(size: int = 14, seed: int = 0, subsets=tuple(SUBSETS)) -> Batch:
    """Texts, pictures and spectrograms of unequal sizes; sample i has the i-th subset of the modalities, in turn."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    items: dict[str, tuple[list, list]] = {name: ([], []) for name in ("text", "image", "audio")}
    for row in range(size):
        for name in subsets[row % len(subsets)]:
            if name == "text":
                item = torch.randint(0, 50, (draw(1, 9),), generator=generator)
            elif name == "image":
                shape = (4 * draw(1, 4), 4 * draw(1, 4), 3)
                item = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            else:
                item = torch.randn(4 * draw(1, 6), 5, generator=generator)
            items[name][0].append(item)
            items[name][1].append(row)
    features = {"text": 0, "image": 1, "audio": 1}
    return Batch(
        ids=tuple(f"row-{row}" for row in range(size)),
        inputs={name: Ragged.stack(*pair, features[name]) for name, pair in items.items() if pair[0]},
        targets={"label": torch.randint(0, 7, (size,), generator=generator)},
        indices=tuple(range(size)),
    )


def small_model(kind: str = "concatenation", dim: int = 24, visibility=None, **fusion) -> Model:
    """A model of all three modalities, all parameters scrambled."""
    attention = partial(Attention, num_heads=3, num_kv_heads=1, rotary=Rotary)
    layer = partial(Block, attention=attention)
    if kind in ("cross", "perceiver"):
        layer = partial(Block, attention=attention, cross=partial(CrossAttention, num_heads=2))
    options: dict = {
        "concatenation": {"stream": ["latent", "image", "audio", "text"], "num_latents": 1},
        "cross": {"stream": ["latent", "text"], "context": ["image", "audio"], "num_latents": 1},
        "perceiver": {"stream": ["latent"], "context": ["image", "audio", "text"], "num_latents": 3},
    }[kind] | fusion
    encoders = {
        "text": Encoder(TextEmbedder(dim, 50, Sinusoid), [Transformer(dim, 1, [partial(Block, attention=attention)])]),
        "image": Encoder(image_patches(dim, 4, 3, partial(LearnedGrid, num_positions=8))),
        "audio": Encoder(mel_patches(dim, 5, 4, Sinusoid)),
    }
    transformer = Transformer(dim, 2, [layer], visibility=visibility)
    fusion_part = Fusion(dim, transformer=transformer, pool=MeanPool(["latent"]), **options)
    model = Model(encoders, fusion_part, {"answer": Head(dim, 7)})
    scramble(model)
    return model
