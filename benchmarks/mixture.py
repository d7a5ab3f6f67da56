"""Random batches of texts, pictures and sounds of many sizes, as real mixed data has them."""

from __future__ import annotations

import numpy as np
import torch

from mmformer.batch import Batch, Ragged

PATCH = 16  # pixels
MELS = 64
FRAMES = 4  # log-mel frames a token: at 100 frames a second, 25 tokens a second
VOCABULARY = 8192
CLASSES = 10
SIZES = (128, 160, 192, 224, 256, 288)  # pixels: the side of a square of equal area
ASPECTS = (1, 1, 4 / 3, 3 / 4, 16 / 9, 9 / 16)


def mixed_batch(seed: int, num_samples: int = 16, missing: float = 0.3) -> Batch:
    """Texts of 8-77 tokens, pictures of 128-288 px in six aspect ratios, sounds of 0.5-10 s; never none of all."""
    rng = np.random.default_rng(seed)
    there = rng.random((num_samples, 3)) >= missing
    while not there.any(1).all():
        lost = ~there.any(1)
        there[lost] = rng.random((int(lost.sum()), 3)) >= missing
    rows = [np.flatnonzero(column).tolist() for column in there.T]
    make = torch.Generator().manual_seed(seed)
    return Batch(
        ids=tuple(str(i) for i in range(num_samples)),
        inputs={
            "text": Ragged.stack([_text(rng, make) for _ in rows[0]], rows[0]),
            "image": Ragged.stack([_picture(rng, make) for _ in rows[1]], rows[1], feature_dims=1),
            "audio": Ragged.stack([_sound(rng, make) for _ in rows[2]], rows[2], feature_dims=1),
        },
        targets={"label": torch.randint(CLASSES, (num_samples,), generator=make)},
    )


def _text(rng: np.random.Generator, make: torch.Generator) -> torch.Tensor:
    return torch.randint(VOCABULARY, (int(rng.integers(8, 78)),), generator=make)


def _picture(rng: np.random.Generator, make: torch.Generator) -> torch.Tensor:
    side, aspect = rng.choice(SIZES) / PATCH, rng.choice(ASPECTS)
    height, width = round(side / aspect**0.5), round(side * aspect**0.5)
    return torch.randint(256, (height * PATCH, width * PATCH, 3), generator=make, dtype=torch.uint8)


def _sound(rng: np.random.Generator, make: torch.Generator) -> torch.Tensor:
    tokens = round(25 * rng.uniform(0.5, 10))
    return torch.randn(tokens * FRAMES, MELS, generator=make)
