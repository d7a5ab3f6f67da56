"""What the tests of all systems of pictures and texts share: both inputs in one batch, the account, gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmformer.checkpoints.load import Loaded, load
from mmformer.tokens import Tokens, to_padded
from tests.checkpoints.families.visions import CONFIGURED, OPENAI, goes_back
from tests.checkpoints.oracles import batch, pictures, pixels, saved, scramble

WORDS = 61
LENGTHS = (4, 9, 1, 13, 9)
VISION = {
    "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 44, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def loaded_from(reference: Any, folder: Path, **options: Any) -> Loaded:
    """Ours from the file that a scrambled reference of transformers wrote; the account must be complete."""
    loaded = load(saved(scramble(reference), folder), options=options)
    report = loaded.report
    assert report.ok, str(report)
    assert not report.of("new", "resized", "ignored", "copied", "zero-filled"), str(report)
    assert {item.name for line in report.of("configured") for item in line.targets} == CONFIGURED
    return loaded


def texts(lengths: Sequence[int] = LENGTHS, words: int = WORDS, seed: int = 3) -> list[Tensor]:
    """Ids of several lengths; two are equal, so that groups form."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, words - 2, (length,), generator=generator) for length in lengths]


def padded(items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same ids as rows of one length, and where they are real."""
    width = max(map(len, items))
    rows = torch.stack([nn.functional.pad(item, (0, width - len(item))) for item in items])
    return rows, torch.stack([torch.arange(width) < len(item) for item in items]).long()


class Pairs:
    """A picture and a text for each sample, for ours and for a reference."""

    def __init__(self, items: Sequence[Tensor] | None = None, side: int = 16, **more: Sequence[Tensor]):
        self.texts = list(items or texts())
        self.images = images = pictures(len(self.texts), side, side)
        self.pixels = pixels(images, *OPENAI)
        self.ids, self.mask = padded(self.texts)
        self.batch = batch(len(self.texts), image=images, text=self.texts, **more)

    def __iter__(self):
        """Each sample as a batch of its own: pixels and ids."""
        return iter([(self.pixels[i : i + 1], text[None]) for i, text in enumerate(self.texts)])


def rows(tokens: Tokens) -> list[Tensor]:
    """The vectors of each sample."""
    spread = to_padded(tokens)
    return [row[keep] for row, keep in zip(spread.x, spread.valid, strict=True)]


def reasons(loaded: Loaded) -> dict[str, str]:
    """Why each tensor of the file was left out that was."""
    return {item.name: line.note for line in loaded.report.of("ignored") for item in line.sources}


def timm_names(vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of pictures of a BLIP of transformers as the originals name it."""
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "layer_norm": "norm",
        "post_layernorm": "norm",
    }
    out = {}
    for name, tensor in vision.items():
        for theirs, timms in names.items():
            name = name.replace(theirs, timms)
        out[f"visual_encoder.{name}"] = tensor
    return out


def moves(loaded: Loaded, *outs: Tensor) -> None:
    """Assert that every parameter of the model and its objectives moves one of these outputs."""
    sum(out.pow(3).mean() for out in outs).backward()
    held = nn.ModuleList([loaded.model, *loaded.objectives.values()])
    still = [name for name, p in held.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still, still
    held.zero_grad()


def into_its_class(loaded: Loaded, reference: Any, folder: Path) -> None:
    """Assert that ours is the reference's file again, bit for bit, and fits its class without a rest."""
    made = goes_back(loaded, load_file(folder / "model.safetensors"))
    again = type(reference)(reference.config)
    tied = {name for name in again.state_dict() if name not in made}
    account = again.load_state_dict(made, strict=False)
    assert not account.unexpected_keys
    assert set(account.missing_keys) == tied
    held = again.state_dict()
    unlike = [name for name, tensor in reference.state_dict().items() if not torch.equal(held[name], tensor)]
    assert not unlike, unlike
