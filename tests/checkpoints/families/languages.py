"""What the tests of all language models share: texts of several lengths, both outputs side by side, the way back."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmformer.checkpoints.load import Loaded, load, named_tensors
from mmformer.checkpoints.plan import original
from mmformer.model import Model
from tests.checkpoints.oracles import batch, close, hidden, saved, scramble

VOCABULARY = 97


def random_texts(lengths: Sequence[int] = (1, 7, 4, 7, 12), low: int = 5) -> list[Tensor]:
    """Ids from `low` on, below which the special ones lie; some lengths occur twice, so that groups form."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(low, VOCABULARY, (length,), generator=generator) for length in lengths]


@dataclass(frozen=True)
class Pair:
    """A reference, and ours from the file that it wrote."""

    reference: Any
    loaded: Loaded
    folder: Path
    texts: list[Tensor]

    @property
    def model(self) -> Model:
        assert isinstance(self.loaded.model, Model)
        return self.loaded.model

    def part(self, name: str) -> Any:
        """A part of our model by its path."""
        return self.model.get_submodule(name)

    def ours(self) -> list[Tensor]:
        """Our last hidden states of each text; all texts go through in one packed row."""
        return hidden(self.model, batch(len(self.texts), text=self.texts), "text")

    def scores(self) -> list[Tensor]:
        """Our scores over the vocabulary, of each text."""
        return [self.model.heads["vocabulary"](states) for states in self.ours()]

    def pooled(self) -> Tensor:
        """Our one vector for each text."""
        return self.model.summary(self.model.encode(batch(len(self.texts), text=self.texts)), "text")[0].detach()

    def theirs(self, name: str) -> list[Tensor]:
        """An output of the reference for each text, one at a time."""
        with torch.inference_mode():
            return [self.reference(input_ids=text[None])[name][0] for text in self.texts]

    def close(self, ours: list[Tensor], theirs: list[Tensor]) -> float:
        """Assert that all texts are within the bar; the greatest difference."""
        return close(torch.cat(ours).detach(), torch.cat(theirs))


def pair(reference: Any, folder: Path, texts: list[Tensor] | None = None, **options: Any) -> Pair:
    """Scramble a reference, save it, and load ours from the file; the account must be complete."""
    loaded = load(saved(scramble(reference), folder), options=options)
    assert loaded.report.ok, str(loaded.report)
    assert not loaded.report.of("new", "zero-filled", "configured", "resized", "ignored"), str(loaded.report)
    return Pair(reference, loaded, folder, texts or random_texts())


def goes_back(pair: Pair) -> None:
    """Assert that ours under the names of the original is its file again, and fits its class without a rest."""
    made = original(named_tensors(pair.model), pair.loaded.family.rules(pair.loaded.described))
    stored = load_file(pair.folder / "model.safetensors")
    assert made.keys() == stored.keys()
    assert all(torch.equal(made[name], tensor) and made[name].dtype == tensor.dtype for name, tensor in stored.items())
    again = pair.folder / "again"
    again.mkdir()
    shutil.copy(pair.folder / "config.json", again)
    save_file(made, again / "model.safetensors", {"format": "pt"})
    rebuilt, account = type(pair.reference).from_pretrained(again, output_loading_info=True)
    assert not any(account.values()), account
    held = rebuilt.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in pair.reference.state_dict().items())


def gradients_flow(pair: Pair) -> None:
    """Assert that every parameter of ours moves the scores, or the states where there are none."""
    model = pair.model
    encoded = model.encode(batch(len(pair.texts), text=pair.texts))
    states, pooled = encoded["text"].x, model.summary(encoded, "text")[0]
    outs = [states, pooled, *(head(states) for head in model.heads.values())]
    torch.stack([out.pow(3).mean() for out in outs]).sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, still
    model.zero_grad()
