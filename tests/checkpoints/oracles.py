"""What every parity test needs: a reference with all parameters scrambled, its file, and the bar.

reference = scramble(transformers.ViTModel(config))      # default initialisation hides errors
loaded = load(saved(reference, tmp_path))                # save_pretrained: names on disk differ from those in memory
with torch.inference_mode():
    close(loaded.model.summary(...)[0], reference(pixel_values=pixels).last_hidden_state[:, 0])
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mmformer.batch import Batch, Ragged
from mmformer.model import Model
from mmformer.tokens import to_padded

LEFT_ALONE = ("logit_scale", "logit_bias", "temp")
"""Scales and temperatures: random ones would drown what is compared."""


def scramble(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and floating buffer-like table random but well-scaled, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(word in name.rsplit(".", 1)[-1] for word in LEFT_ALONE):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                tall = parameter.ndim == 2 and parameter.shape[0] > 8 * parameter.shape[1]
                parameter.copy_(noise * (0.3 if tall else 1 / math.sqrt(max(1, fan_in))))
            else:
                scale = name.endswith("weight") or "gamma" in name or "lambda" in name
                parameter.copy_(scale + 0.15 * noise)
    return module.eval()


def saved(reference: nn.Module, folder: Path, **options) -> Path:
    """The folder a model of transformers saved itself to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about its own past
        reference.save_pretrained(folder, **options)  # pyright: ignore[reportCallIssue]
    return folder


def close(ours: Tensor, reference: Tensor, bar: float = 1e-5) -> float:
    """Assert that the greatest difference is at most `bar` x max(1, greatest of the reference); gives it back."""
    assert ours.shape == reference.shape, f"{tuple(ours.shape)}, the reference {tuple(reference.shape)}"
    difference = float((ours.double() - reference.double()).abs().max())
    limit = bar * max(1.0, float(reference.abs().max()))
    assert difference <= limit, f"differs by {difference:.2e}, at most {limit:.2e}"
    return difference


def pictures(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Random pictures (count, height, width, channels) of bytes, as `Batch` holds them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, channels), generator=generator, dtype=torch.uint8)


def pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The same pictures (count, channels, height, width) as an image processor gives them to a reference."""
    scaled = images.double() / 255
    normal = (scaled - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std, dtype=torch.float64)
    return normal.permute(0, 3, 1, 2).float()


def batch(size: int, **inputs: Sequence[Tensor] | Tensor) -> Batch:
    """A batch of `size` samples: items by modality, the i-th of sample i; texts are 1-D, waveforms too.

    Pictures are (height, width, channels), spectrograms (frames, mels).
    """
    axes = {"image": 1, "audio": 1}
    return Batch(
        ids=tuple(f"row-{row}" for row in range(size)),
        inputs={
            name: Ragged.stack(list(items), list(range(len(items))), axes.get(name, 0) if items[0].ndim > 1 else 0)
            for name, items in inputs.items()
        },
        targets={},
        indices=tuple(range(size)),
    )


def hidden(model: Model, inputs: Batch, modality: str) -> list[Tensor]:
    """The tokens (T, D) of each sample that an encoder gives."""
    tokens = to_padded(model.encode(inputs)[modality])
    return [row[keep] for row, keep in zip(tokens.x, tokens.valid, strict=True)]
