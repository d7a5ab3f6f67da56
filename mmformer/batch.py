"""What a loader hands to a model: raw tensors of any modality, and which sample each belongs to.

Everything the layout of a step depends on (how many items, how large, whose) is kept as Python integers, so that
it is known on the host and costs no device synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Ragged:
    """Items of one modality, of different sizes, laid end to end in one tensor.

    Item i has the shape `shapes[i] + values.shape[1:]` and belongs to sample `rows[i]` of the batch. A text has the
    shape (length,), a picture (height, width), a waveform (samples,), a log-mel spectrogram (frames,). Items are
    sorted by shape, so that those of equal shape adjoin and one kernel call serves them all.

    Where a sample is a sequence of items (text, picture, text), `places[i]` is the place of item i in it, counted over
    all modalities; empty where samples have no such order. `hidden` says, for each cell that an encoder cuts the
    items into, whether it is not to see it: masked modelling sets it for the time of one encoding.
    """

    values: Shaped[Tensor, "N ..."]
    shapes: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    places: tuple[int, ...] = ()
    hidden: Bool[np.ndarray, " T"] | None = None

    @classmethod
    def stack(
        cls, items: Sequence[Tensor], rows: Sequence[int], feature_dims: int = 0, places: Sequence[int] = ()
    ) -> Ragged:
        """Lay items end to end; the last `feature_dims` axes (colours, mel bins) must agree between them."""
        if len(items) != len(rows):
            raise ValueError(f"{len(items)} items but {len(rows)} rows: give one row for each item")
        if places and len(places) != len(items):
            raise ValueError(f"{len(items)} items but {len(places)} places: give one place for each item, or none")
        cut = [tuple(item.shape[: item.ndim - feature_dims]) for item in items]
        order = sorted(range(len(items)), key=lambda i: (prod(cut[i]), cut[i]))
        feature = tuple(items[0].shape[items[0].ndim - feature_dims :]) if items else ()
        flat = [items[i].reshape(-1, *feature) for i in order]
        return cls(
            values=torch.cat(flat) if flat else torch.empty(0),
            shapes=tuple(cut[i] for i in order),
            rows=tuple(rows[i] for i in order),
            places=tuple(places[i] for i in order) if places else (),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def groups(self) -> Iterator[Tensor]:
        """Yield the items of each shape as one dense tensor (items, *shape, *C), in order and without a copy."""
        start = item = 0
        while item < len(self.shapes):
            shape = self.shapes[item]
            stop = item
            while stop < len(self.shapes) and self.shapes[stop] == shape:
                stop += 1
            count = stop - item
            size = prod(shape)
            yield self.values[start : start + count * size].view(count, *shape, *self.values.shape[1:])
            start, item = start + count * size, stop

    def items(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (row, item) for every item."""
        rows = iter(self.rows)
        for group in self.groups():
            for item in group:
                yield next(rows), item

    def keep(self, rows: Mapping[int, int]) -> Ragged | None:
        """Keep the items whose row is a key of `rows`, renumbered by it; None when none is left.

        Raises:
            ValueError: items of which something is hidden.
        """
        if self.hidden is not None:
            raise ValueError("cells of these items are hidden: choose the samples first, then hide")
        kept = [(i, item) for i, (row, item) in enumerate(self.items()) if row in rows]
        if not kept:
            return None
        return Ragged.stack(
            [item for _, item in kept],
            [rows[self.rows[i]] for i, _ in kept],
            self.values.ndim - 1,
            [self.places[i] for i, _ in kept] if self.places else (),
        )

    def to(self, *args, **kwargs) -> Ragged:
        return replace(self, values=self.values.to(*args, **kwargs))

    def pin_memory(self, *args) -> Ragged:
        return replace(self, values=self.values.pin_memory(*args))


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that could not be read: which row, which column, which file, and why."""

    id: str
    column: str
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B samples, each with any subset of the modalities.

    `inputs` holds only modalities that some sample has. `targets[name]` has B rows; a missing target is NaN in a
    float tensor and -100 in an integer one. `ids` name the samples in every error. `faults` are what the loader had
    to leave out of this batch. `epoch` and `indices` are the counters that random numbers are drawn from.
    """

    ids: tuple[str, ...]
    inputs: dict[str, Ragged]
    targets: dict[str, Tensor] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    epoch: int = 0
    indices: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, *args, **kwargs) -> Batch:
        return replace(
            self,
            inputs={name: ragged.to(*args, **kwargs) for name, ragged in self.inputs.items()},
            targets={name: target.to(*args, **kwargs) for name, target in self.targets.items()},
        )

    def pin_memory(self, *args) -> Batch:
        return replace(
            self,
            inputs={name: ragged.pin_memory(*args) for name, ragged in self.inputs.items()},
            targets={name: target.pin_memory(*args) for name, target in self.targets.items()},
        )

    def only(self, modalities: Sequence[str]) -> Batch:
        """The same samples with every other modality taken away."""
        return replace(self, inputs={name: self.inputs[name] for name in modalities if name in self.inputs})

    def select(self, rows: Sequence[int]) -> Batch:
        """The given samples, in the given order."""
        place = {row: new for new, row in enumerate(rows)}
        kept = {name: ragged.keep(place) for name, ragged in self.inputs.items()}
        index = torch.tensor(list(rows), dtype=torch.long)
        return replace(
            self,
            ids=tuple(self.ids[row] for row in rows),
            inputs={name: ragged for name, ragged in kept.items() if ragged is not None},
            targets={name: target[index.to(target.device)] for name, target in self.targets.items()},
            indices=tuple(self.indices[row] for row in rows) if self.indices else (),
        )

    def present(self) -> tuple[frozenset[str], ...]:
        """For each sample, the modalities that it has."""
        have: list[set[str]] = [set() for _ in self.ids]
        for name, ragged in self.inputs.items():
            for row in ragged.rows:
                have[row].add(name)
        return tuple(frozenset(names) for names in have)
