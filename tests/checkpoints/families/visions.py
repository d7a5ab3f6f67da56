"""What the tests of all picture families share: the account, the way back, gradients, and norms of one epsilon."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.checkpoints.load import Loaded, load, named_tensors
from mmformer.checkpoints.plan import original
from mmformer.checkpoints.report import Report
from tests.checkpoints.oracles import batch, hidden, pictures, pixels, saved, scramble

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CONFIGURED = {"encoders.image.embedder.normalize.mean", "encoders.image.embedder.normalize.std"}


def loaded_from(reference: Any, folder: Path, **options: Any) -> Loaded:
    """Ours from the file that a scrambled reference of transformers wrote."""
    loaded = load(saved(scramble(reference), folder), options=options)
    complete(loaded.report)
    return loaded


def complete(report: Report, zeros: Sequence[str] = ()) -> None:
    """Assert that each tensor of the file came in, and each of the model from it, but for the colours and `zeros`."""
    assert report.ok, str(report)
    assert not report.of("new", "resized", "ignored", "copied", "tied"), str(report)
    left = {item.name for line in report.of("configured", "zero-filled") for item in line.targets}
    assert left <= {*CONFIGURED, "objectives.contrastive.bias"} | {*zeros}, str(report)


def tensors(loaded: Loaded) -> dict[str, Tensor]:
    """The tensors of a model and its objectives, as rules name them."""
    found = named_tensors(loaded.model)
    for name, objective in loaded.objectives.items():
        found |= named_tensors(objective, f"objectives.{name}")
    return found


def goes_back(loaded: Loaded, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Assert that ours under the names of the original is what its file holds, bit for bit; gives it back."""
    made = original(tensors(loaded), loaded.family.rules(loaded.described))
    assert made.keys() == stored.keys()
    unlike = [name for name, tensor in stored.items() if not torch.equal(made[name], tensor)]
    assert not unlike, unlike
    assert all(made[name].dtype == tensor.dtype for name, tensor in stored.items())
    return made


def gradients_flow(loaded: Loaded, inputs: Batch) -> None:
    """Assert that every parameter of the model moves its heads, or its tokens where it has none, or its objectives."""
    model = loaded.model
    encoded = model.encode(inputs)
    outs = [tokens.x.pow(3).mean() for tokens in encoded.values()]
    outs += [model.summary(encoded, name)[0].pow(3).mean() for name in encoded]
    for name, head in model.heads.items():
        source = name if name in encoded else "image"
        outs.append(head(model.summary(encoded, source)[0]).pow(3).sum())
    outs += [loss for objective in loaded.objectives.values() for loss in objective(model, encoded, inputs).values()]
    sum(outs).backward()
    parts = nn.ModuleList([model, *loaded.objectives.values()])
    still = [name for name, p in parts.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still, still
    parts.zero_grad()


def epsilons(module: nn.Module) -> set[float]:
    """The epsilons of all norms: differences between them lie below any bar on outputs."""
    return {part.eps for part in module.modules() if isinstance(part, nn.LayerNorm)}


def png(height: int, width: int) -> bytes:
    """A picture as a file."""
    held = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 90)).save(held, "PNG")
    return held.getvalue()


class Shown:
    """Some random pictures, for ours and for a reference."""

    def __init__(self, height: int, width: int, colours=HALF, count: int = 3):
        self.images = pictures(count, height, width)
        self.batch = batch(count, image=self.images)
        self.pixels = pixels(self.images, *colours)

    def tokens(self, loaded: Loaded) -> Tensor:
        """Our tokens of each picture."""
        with torch.inference_mode():
            return torch.stack(hidden(loaded.model, self.batch, "image"))

    def pooled(self, loaded: Loaded) -> Tensor:
        """Our one vector of each picture."""
        with torch.inference_mode():
            return loaded.model.summary(loaded.model.encode(self.batch), "image")[0]

    def output(self, loaded: Loaded, head: str) -> Tensor:
        """What one of our heads says of each picture."""
        with torch.inference_mode():
            return loaded.model.output(loaded.model.encode(self.batch), head, "image")[0]
