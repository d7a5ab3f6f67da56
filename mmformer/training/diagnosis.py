"""What of a batch makes a loss or its gradients NaN or infinite: the rows, the inputs, the weights, the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmformer.batch import Batch, Ragged
from mmformer.tokens import Tokens

Losses = Callable[[Batch], Mapping[str, Tensor]]
"""The losses of a batch by name."""

_MOST_ROWS = 16
"""Of more rows than these the first are named: it is then no matter of single rows."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Where NaN or infinity is: `rows` by their ids, alone or only together.

    `losses` are those of the whole batch, `inputs` the rows by modality or target whose values are not finite,
    `weights` and `gradients` names of parameters, `module` the first one that gave out what is not finite.
    """

    rows: list[str] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, list[str]] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    module: str | None = None

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """One line for each thing that was found."""
        bad = [name for name, loss in self.losses.items() if not torch.isfinite(torch.tensor(loss))]
        found = [f"rows: {_some(self.rows)}"] if self.rows else ["rows: none alone; all of the batch together"]
        found += [f"objectives: {', '.join(f'{name} is {self.losses[name]}' for name in bad)}"] if bad else []
        found += [f"inputs: {name} of {_some(rows)}" for name, rows in self.inputs.items()]
        found += [f"weights: {_some(self.weights)}"] if self.weights else []
        found += [f"layer: {self.module} gave out the first value that is not finite"] if self.module else []
        found += [f"gradients: of {_some(self.gradients)}"] if self.gradients and not bad else []
        return found


def diagnose(parts: nn.Module, losses: Losses, batch: Batch, seed: int, gradients: bool = True) -> Diagnosis:
    """Find out by computing the batch once more, in halves down to single rows, with the same random numbers.

    `gradients` says whether to look at those too: over several processes they cannot be asked for by one alone.
    """
    probe = _Probe(parts, losses, seed, gradients)
    inputs, weights = _inputs(batch), [n for n, p in parts.named_parameters() if not _finite(p)]
    with _first_output(parts) as first:
        found = probe.losses(batch)
    known = dict.fromkeys(row for rows in inputs.values() for row in rows)
    rows = list(known) or ([] if weights else [batch.ids[i] for i in probe.guilty(batch, range(len(batch)))])
    return Diagnosis(
        rows=rows,
        losses={name: loss.item() for name, loss in found.items()},
        inputs=inputs,
        weights=weights,
        gradients=probe.broken_gradients(found),
        module=first[0] if first else None,
    )


class _Probe:
    def __init__(self, parts: nn.Module, losses: Losses, seed: int, gradients: bool):
        self._losses, self._seed, self._gradients = losses, seed, gradients
        self._trained = {name: p for name, p in parts.named_parameters() if p.requires_grad}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        with torch.random.fork_rng(), torch.set_grad_enabled(self._gradients):
            torch.manual_seed(self._seed)
            return dict(self._losses(batch))

    def broken_gradients(self, found: Mapping[str, Tensor]) -> list[str]:
        """The parameters whose gradient is not finite."""
        given = [loss for loss in found.values() if loss.requires_grad]
        if not given:
            return []
        total = torch.stack(given).sum()
        slopes = torch.autograd.grad(total, list(self._trained.values()), allow_unused=True)
        pairs = zip(self._trained, slopes, strict=True)
        return [name for name, slope in pairs if slope is not None and not _finite(slope)]

    def guilty(self, batch: Batch, rows: Sequence[int]) -> list[int]:
        """The rows that are bad by themselves; those of a group that is bad only together; none of a good group."""
        part = batch.select(rows) if len(rows) < len(batch) else batch
        found = self.losses(part)
        if all(_finite(loss) for loss in found.values()) and not self.broken_gradients(found):
            return []
        if len(rows) == 1:
            return list(rows)
        half = len(rows) // 2
        alone: list[int] = []
        for side in (rows[:half], rows[half:]):
            if len(alone) < _MOST_ROWS:
                alone += self.guilty(batch, side)
        return alone or list(rows)


def _inputs(batch: Batch) -> dict[str, list[str]]:
    """By modality or target, the rows that hold what is not finite; a missing target is NaN, and is none of these."""
    found = {
        name: [batch.ids[row] for row, item in items.items() if not _finite(item)]
        for name, items in batch.inputs.items()
        if not _finite(items.values)
    }
    for name, target in batch.targets.items():
        infinite = target.reshape(len(batch), -1).isinf().any(1)
        if infinite.any():
            found[name] = [batch.ids[row] for row in infinite.nonzero()[:, 0].tolist()]
    return found


@contextmanager
def _first_output(parts: nn.Module) -> Iterator[list[str]]:
    """Collects the names of modules that give out what is not finite, in the order in which they do."""
    names: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            values = out.x if isinstance(out, Tokens) else out
            if isinstance(values, Tensor) and not _finite(values):
                names.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in parts.named_modules() if name]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def _finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values).all())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# ---------------------------------------------------------------------- batches as files


def to_plain(batch: Batch) -> dict[str, Any]:
    """A batch as tensors, strings and numbers in dictionaries, which a file holds without naming a class."""
    inputs = {
        name: {"values": part.values.cpu(), "shapes": part.shapes, "rows": part.rows, "places": part.places}
        for name, part in batch.inputs.items()
    }
    targets = {name: target.cpu() for name, target in batch.targets.items()}
    return {"ids": batch.ids, "inputs": inputs, "targets": targets, "epoch": batch.epoch, "indices": batch.indices}


def from_plain(plain: Mapping[str, Any]) -> Batch:
    """What `to_plain` was given."""
    return Batch(**{**plain, "inputs": {name: Ragged(**part) for name, part in plain["inputs"].items()}})
