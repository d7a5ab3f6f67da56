"""What the tests of all sound families share: recordings of several lengths, the account, the way back, gradients."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmformer.batch import Batch
from mmformer.checkpoints.load import Loaded, load, named_tensors
from mmformer.checkpoints.plan import original
from tests.checkpoints.oracles import close, hidden, saved, scramble

CONFIGURED = {"encoders.audio.embedder.normalize.mean", "encoders.audio.embedder.normalize.std"}


def noise(*lengths: int, width: int | None = None, seed: int = 0) -> list[Tensor]:
    """Waveforms of these lengths, or spectrograms with `width` mel bins."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((n, width) if width else (n,), generator=generator) for n in lengths]


def loaded_from(reference: Any, folder: Path, **options: Any) -> Loaded:
    """Ours from the file that a scrambled reference of transformers wrote, with a complete account."""
    loaded = load(saved(scramble(reference), folder), options=options)
    complete(loaded)
    return loaded


def complete(loaded: Loaded) -> None:
    """Assert that each tensor of the file came in, and each of the model from it, but for mean and deviation."""
    report = loaded.report
    assert report.ok, str(report)
    assert not report.of("new", "resized", "ignored", "copied", "zero-filled"), str(report)
    assert {item.name for line in report.of("configured") for item in line.targets} <= CONFIGURED
    assert {item.name for line in report.of("tied") for item in line.targets} <= {"heads.vocabulary.out.weight"}


def heard(loaded: Loaded, inputs: Batch) -> list[Tensor]:
    """Our tokens of each recording, all of them in one packed row."""
    with torch.no_grad():
        return hidden(loaded.model, inputs, "audio")  # pyright: ignore[reportArgumentType]


def all_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Assert that each is within the bar; the greatest difference."""
    return max(close(mine, other) for mine, other in zip(ours, theirs, strict=True))


def goes_back(loaded: Loaded, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Assert that ours under the names of the original is what its file holds, bit for bit; gives it back."""
    made = original(named_tensors(loaded.model), loaded.family.rules(loaded.described))
    assert made.keys() == stored.keys()
    unlike = [n for n, t in stored.items() if not torch.equal(made[n], t) or made[n].dtype != t.dtype]
    assert not unlike, unlike
    return made


def goes_back_to(reference: Any, loaded: Loaded, folder: Path) -> None:
    """Assert the same of a folder of transformers, and that its own class loads it without a rest."""
    made = goes_back(loaded, load_file(folder / "model.safetensors"))
    again = folder / "again"
    again.mkdir()
    shutil.copy(folder / "config.json", again)
    save_file(made, again / "model.safetensors", {"format": "pt"})
    rebuilt, account = type(reference).from_pretrained(again, output_loading_info=True)
    assert not any(account.values()), account
    held = rebuilt.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in reference.state_dict().items())


def gradients_flow(loaded: Loaded, inputs: Batch, *pooled: str) -> None:
    """Assert that every parameter moves the tokens or a head; `pooled` heads read one vector a recording."""
    model = loaded.model
    encoded = model.encode(inputs)
    states = [tokens.x for tokens in encoded.values()] + ([model.fuse(encoded).x] if model.fusion else [])
    outs = [*states, model.summary(encoded, "audio")[0]]
    outs += [model.output(encoded, head, "audio")[0] for head in pooled]
    outs += [model.heads[head](states[-1]) for head in model.heads if head not in pooled]
    torch.stack([out.pow(3).mean() for out in outs]).sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, still
    model.zero_grad()
