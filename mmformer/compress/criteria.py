"""How much each unit of a model matters: by its weights, by gradients, by what flows through it.

A criterion gives a row of scores for each site, at least 0, on a scale that all sites share: what has the least score
for what it costs goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmformer.batch import Batch
from mmformer.compress.sites import Channels, Heads, Layers, Site, named_layers
from mmformer.model import Model
from mmformer.objectives import Objective
from mmformer.tokens import Tokens
from mmformer.training.evaluation import subsets

Loss = Callable[[Batch], Tensor]
Scores = list[Float[Tensor, " _"]]


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, where it can be cut, what it was trained for, and batches of real samples."""

    model: Model
    sites: Sequence[Site]
    objectives: Mapping[str, Objective]
    batches: Sequence[Batch]

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The sum of the losses of the objectives that are judged; 0 where none says anything of these samples.

        Raises:
            ValueError: no objective is judged.
        """
        judged = [part for part in self.objectives.values() if part.headline is not None]
        if not judged:
            raise ValueError(
                f"none of the objectives {sorted(self.objectives)} is judged, so nothing says what matters: choose "
                "Magnitude, which asks for no loss"
            )
        encoded = self.model.encode(batch)
        found = [loss for part in judged for loss in part(self.model, encoded, batch).values()]
        return torch.stack([*found, next(self.model.parameters()).new_zeros(())]).sum()


@runtime_checkable
class Criterion(Protocol):
    """Scores of all units of all sites."""

    def __call__(self, subject: Subject) -> Scores: ...


@dataclass(frozen=True)
class Magnitude:
    """The norm of a unit's weights, as a share of the mean of its site; it needs no samples."""

    def __call__(self, subject: Subject) -> Scores:
        found = [site.weigh(subject.model) for site in subject.sites]
        return [scores / scores.mean().clamp(min=1e-12) for scores in found]


@dataclass(frozen=True)
class Taylor:
    """By how much the loss would change without a unit, to first order.

    The mean over batches of the absolute gradient of the unit's gate (arXiv 1905.10650, equation 2, for heads), or
    with `squared` of its square, the diagonal of the Fisher information (arXiv 1906.10771, equation 8).
    """

    squared: bool = False

    def __call__(self, subject: Subject) -> Scores:
        totals = [torch.zeros(site.count) for site in subject.sites]
        with _frozen(subject.model), gated(subject.model, subject.sites) as gates:
            for batch in subject.batches:
                loss = subject.loss(batch)
                found = torch.autograd.grad(loss, gates, allow_unused=True) if loss.requires_grad else []
                for total, slope in zip(totals, found, strict=False):
                    if slope is not None:
                        total += slope.cpu().square() if self.squared else slope.cpu().abs()
        return [total / max(1, len(subject.batches)) for total in totals]


@dataclass(frozen=True)
class Activation:
    """The norm of what a unit gives times that of the weights that read it (Wanda, arXiv 2306.11695, for structures).

    As a share of the mean of its site. A layer is scored by how far it moves its tokens.
    """

    def __call__(self, subject: Subject) -> Scores:
        norms = [torch.zeros(site.count) for site in subject.sites]
        handles: list[RemovableHandle] = []
        for site, total in zip(subject.sites, norms, strict=True):
            if isinstance(site, Layers):
                layers = named_layers(subject.model, site).values()
                handles += [layer.register_forward_hook(_mover(total, i)) for i, layer in enumerate(layers)]
            elif isinstance(site, Heads | Channels):
                handles.append(site.reading(subject.model).register_forward_pre_hook(_reader(site, total)))
        try:
            with torch.no_grad():
                for batch in subject.batches:
                    subject.loss(batch)
        finally:
            for handle in handles:
                handle.remove()
        return [total.sqrt() / total.sqrt().mean().clamp(min=1e-12) for total in norms]


@dataclass(frozen=True)
class Given:
    """Scores by the first name of each site, such as those that `Movement` gathered while a model was trained."""

    scores: Mapping[str, Float[Tensor, " _"]]

    def __call__(self, subject: Subject) -> Scores:
        if missing := [site.paths[0] for site in subject.sites if site.paths[0] not in self.scores]:
            raise ValueError(f"there are no scores of {', '.join(missing[:4])}: they belong to another model")
        return [self.scores[site.paths[0]].float() for site in subject.sites]


@dataclass(frozen=True)
class ForEverySubset:
    """The most that a unit matters to any subset of the modalities, so that what one alone needs is not cut.

    Another criterion is asked on the samples of each subset, the scores of a subset are brought to a sum of 1 over the
    whole model, and of each unit the highest counts: a subset with a small loss has as much to say as any.
    """

    criterion: Criterion

    def __call__(self, subject: Subject) -> Scores:
        best = [torch.zeros(site.count) for site in subject.sites]
        for scores in self.by_subset(subject).values():
            best = [torch.maximum(b, s) for b, s in zip(best, scores, strict=True)]
        return best

    def by_subset(self, subject: Subject) -> dict[str, Scores]:
        """The scores of each subset by its letters, each with a sum of 1."""
        found = {}
        for letters, names in subsets(list(subject.model.encoders)).items():
            batches = [part for batch in subject.batches if (part := _having(batch, names)) is not None]
            if batches:
                scores = self.criterion(replace(subject, batches=batches))
                total = torch.stack([part.sum() for part in scores]).sum().clamp(min=1e-12)
                found[letters] = [part / total for part in scores]
        return found


def _having(batch: Batch, names: Sequence[str]) -> Batch | None:
    """The samples that have all of some modalities, and nothing else of them."""
    rows = [row for row, has in enumerate(batch.present()) if has.issuperset(names)]
    return batch.select(rows).only(names) if rows else None


@contextmanager
def gated(model: nn.Module, sites: Sequence[Site], gates: Sequence[Tensor] | None = None):
    """A gate for each unit while this is entered: ones with a gradient, where none are given."""
    device = next(model.parameters()).device
    made = [torch.ones(site.count, device=device, requires_grad=True) for site in sites] if gates is None else gates
    handles = [handle for site, gate in zip(sites, made, strict=True) for handle in site.gate(model, gate)]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module):
    """No gradients of the weights, which nobody asks for."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _reader(site: Heads | Channels, total: Float[Tensor, " count"]) -> Callable[[nn.Module, tuple], None]:
    """Adds, for each unit, the squared norm of what it gives times that of the weights that read it."""

    def see(module: nn.Module, inputs: tuple) -> None:
        assert isinstance(module, nn.Linear)
        flowing = inputs[0].detach().flatten(0, -2).float().square().sum(0)
        reading = module.weight.detach().float().square().sum(0)
        total.add_(site.by_unit((flowing * reading).cpu()).sum(1))

    return see


def _mover(total: Float[Tensor, " count"], place: int) -> Callable[[nn.Module, tuple, Tokens], None]:
    """Adds the squared distance by which a layer moves its tokens."""

    def see(module: nn.Module, inputs: tuple, output: Tokens) -> None:
        total[place] += (output.x - inputs[0].x).detach().float().square().sum().cpu()

    return see


def samples(batches: Iterable[Batch], size: int) -> list[Batch]:
    """Batches cut to `size` samples: gradients of small ones say more about single samples."""
    out = []
    for batch in batches:
        out += [batch.select(range(i, min(i + size, len(batch)))) for i in range(0, len(batch), size)]
    return out
