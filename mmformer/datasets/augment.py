"""Augmentation of whole batches, as a pure function of the seed, the epoch and the index of each sample.

What a sample becomes does not depend, to the last bit, on the samples it shares a batch with: every step is
elementwise or a gather, whose rounding knows no batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmformer.batch import Batch, Ragged
from mmformer.datasets.random import Draw


@runtime_checkable
class Transform(Protocol):
    """Changes the items of one modality; `draw` holds the random numbers of each item's sample."""

    def __call__(self, items: Ragged, draw: Draw) -> Ragged: ...


@dataclass(frozen=True)
class Augment:
    """A transform for some modalities, then each modality left out with a probability, though never all of a sample."""

    transforms: Mapping[str, Transform] = field(default_factory=dict)
    dropout: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, batch: Batch, seed: int) -> Batch:
        draw = Draw(seed, batch.epoch, np.array(batch.indices, dtype=np.int64))
        inputs = dict(batch.inputs)
        for name in inputs.keys() & self.transforms.keys():
            inputs[name] = self.transforms[name](inputs[name], draw.of(inputs[name].rows))
        return _drop_modalities(replace(batch, inputs=inputs), self.dropout, draw)


def _drop_modalities(batch: Batch, probabilities: Mapping[str, float], draw: Draw) -> Batch:
    names = sorted(batch.inputs)
    if not any(probabilities.get(name) for name in names):
        return batch
    present = np.zeros((len(batch), len(names)), dtype=bool)
    for column, name in enumerate(names):
        present[list(batch.inputs[name].rows), column] = True
    # A stream a name, so that what else a batch holds changes nothing.
    numbers = np.concatenate([draw.uniform(f"drop {name}", 2) for name in names], 1).reshape(len(batch), -1, 2)
    keep = present & (numbers[..., 0] >= [probabilities.get(name, 0.0) for name in names])
    saved = np.where(present, numbers[..., 1], -1.0).argmax(1)
    none = ~keep.any(1) & present.any(1)
    keep[none, saved[none]] = True
    kept = {
        name: batch.inputs[name].keep({row: row for row in np.flatnonzero(keep[:, column]).tolist()})
        for column, name in enumerate(names)
        if not keep[present[:, column], column].all()
    }
    inputs = {name: kept.get(name, items) for name, items in batch.inputs.items()}
    return replace(batch, inputs={name: items for name, items in inputs.items() if items is not None})


@dataclass(frozen=True)
class PictureJitter:
    """Shift by up to `shift` pixels, turn by up to `rotate` degrees and scale by up to the factor 1 + `scale`.

    The pixels at the edge are continued outwards.
    """

    shift: float = 1.0
    rotate: float = 0.0
    scale: float = 0.0

    def __call__(self, items: Ragged, draw: Draw) -> Ragged:
        numbers = draw.around("picture jitter", 4)
        angle = numbers[:, 2] * math.radians(self.rotate)
        factor = np.exp(-numbers[:, 3] * math.log1p(self.scale))
        maps = np.stack([np.cos(angle) * factor, np.sin(angle) * factor, *(numbers[:, :2] * self.shift).T], 1)
        moved, start = [], 0
        for group in items.groups():
            moved.append(_move(group, torch.from_numpy(maps[start : start + len(group)]).float()))
            start += len(group)
        return replace(items, values=torch.cat([group.flatten(0, 2) for group in moved]))


def _move(group: Tensor, maps: Float[Tensor, "n 4"]) -> Tensor:
    """Sample pictures of one size at turned, scaled and shifted places."""
    height, width = group.shape[1:3]
    y = (torch.arange(height) - (height - 1) / 2)[None, :, None]
    x = (torch.arange(width) - (width - 1) / 2)[None, None, :]
    cos, sin, right, down = maps[:, :, None, None].unbind(1)
    # In grid_sample's units the picture spans -1 to 1.
    at_x = (cos * x + sin * y - right) * (2 / width)
    at_y = (cos * y - sin * x - down) * (2 / height)
    planes = group.permute(0, 3, 1, 2).float()
    found = F.grid_sample(planes, torch.stack([at_x, at_y], -1), padding_mode="border", align_corners=False)
    return found.round_().to(group.dtype).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class LogMelJitter:
    """Stretch time by up to the factor 1 + `stretch`, shift it and the mel bins, and mask one stretch of each.

    Times and masks are in frames and bins. The number of frames stays the same when `keep_length`, so that a longer
    recording loses its ends; otherwise it is rounded to a `multiple`. Masked is 0, the mean of a normalised recording.
    """

    stretch: float = 0.0
    shift: int = 0
    mel_shift: int = 0
    time_mask: int = 0
    mel_mask: int = 0
    keep_length: bool = True
    multiple: int = 1

    def __call__(self, items: Ragged, draw: Draw) -> Ragged:
        values = items.values.numpy()
        lengths = np.array([shape[0] for shape in items.shapes], dtype=np.int64)
        numbers = draw.around("log-mel jitter", 7)
        factor = np.exp(numbers[:, 0] * math.log1p(self.stretch))
        new = lengths
        if not self.keep_length:
            new = np.maximum(1, np.rint(lengths * factor / self.multiple)).astype(np.int64) * self.multiple
        frames = _Frames(new)
        # Place of each new frame in its old recording, measured from the middle of both.
        step = (1 / factor) if self.keep_length else lengths / new
        place = (frames.inside - (new - 1)[frames.item] / 2) * step[frames.item] + ((lengths - 1) / 2)[frames.item]
        place = np.clip(place - np.rint(numbers[:, 1] * self.shift)[frames.item], 0, (lengths - 1)[frames.item])
        out = _between(values, place, (np.cumsum(lengths) - lengths)[frames.item], (lengths - 1)[frames.item])
        out = _shift_bins(out, np.rint(numbers[:, 2] * self.mel_shift).astype(np.int64)[frames.item])
        hidden = _span(numbers[:, 3:5], self.time_mask, new)
        out[(frames.inside >= hidden[0][frames.item]) & (frames.inside < hidden[1][frames.item])] = 0
        low, high = _span(numbers[:, 5:7], self.mel_mask, np.full(len(new), out.shape[1]))
        bins = np.arange(out.shape[1])
        out *= ((bins < low[:, None]) | (bins >= high[:, None]))[frames.item]
        shapes = tuple((int(length),) for length in new)
        if self.keep_length:
            return replace(items, values=torch.from_numpy(out))
        return (
            Ragged.stack(list(torch.from_numpy(out).split(new.tolist())), items.rows, 1, items.places)
            if len(shapes)
            else items
        )


@dataclass(frozen=True)
class _Frames:
    """The frames of several recordings laid end to end: the recording of each, and its place inside it."""

    lengths: Int[np.ndarray, " items"]

    @cached_property
    def item(self) -> Int[np.ndarray, " frames"]:
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def inside(self) -> Int[np.ndarray, " frames"]:
        starts = np.cumsum(self.lengths) - self.lengths
        return np.arange(self.lengths.sum()) - starts[self.item]


def _between(
    values: Float[np.ndarray, "N bins"], place: np.ndarray, start: np.ndarray, last: np.ndarray
) -> Float[np.ndarray, "M bins"]:
    """Rows at fractional places, on the line between the rows around them."""
    below = place.astype(np.int64)
    part = (place - below).astype(np.float32)[:, None]
    return values[start + below] * (1 - part) + values[start + np.minimum(below + 1, last)] * part


def _shift_bins(values: Float[np.ndarray, "M bins"], by: Int[np.ndarray, " M"]) -> Float[np.ndarray, "M bins"]:
    """Move the bins of each row, the outermost one continued."""
    out = values
    for step in np.unique(by[by != 0]):
        if out is values:
            out = values.copy()
        rows = by == step
        out[rows] = values[rows][:, np.clip(np.arange(values.shape[1]) - step, 0, values.shape[1] - 1)]
    return out


def _span(numbers: Float[np.ndarray, "N 2"], longest: int, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A random stretch for each item, up to `longest` and less than half of it, anywhere inside."""
    first, second = (numbers.T + 1) / 2
    size = np.floor(first * (np.minimum(longest, length // 2) + 1)).astype(np.int64)
    start = np.floor(second * (length - size + 1)).astype(np.int64)
    return start, start + size


@dataclass(frozen=True)
class TokenDropout:
    """Leave out tokens with a probability, though never the first or the last."""

    probability: float

    def __call__(self, items: Ragged, draw: Draw) -> Ragged:
        lengths = np.array([shape[0] for shape in items.shapes], dtype=np.int64)
        frames = _Frames(lengths)
        numbers = draw.uniform("token dropout", int(lengths.max(initial=0)))
        keep = numbers[frames.item, frames.inside] >= self.probability
        keep |= (frames.inside == 0) | (frames.inside == (lengths - 1)[frames.item])
        new = np.bincount(frames.item[keep], minlength=len(lengths)).tolist()
        return Ragged.stack(list(items.values[torch.from_numpy(keep)].split(new)), items.rows, places=items.places)


@dataclass(frozen=True)
class PhotographJitter:
    """A random part of a photograph in its full size, mirrored at random, in other colours (torchvision).

    `area` is the least share of the picture, `flip` the probability of a mirror image, `colour` the strength of the
    change in brightness, contrast and saturation.
    """

    area: float = 0.35
    flip: float = 0.5
    colour: float = 0.0

    def __call__(self, items: Ragged, draw: Draw) -> Ragged:
        from torchvision.transforms import v2

        flip = v2.RandomHorizontalFlip(self.flip)
        colour = v2.ColorJitter(self.colour, self.colour, self.colour)
        changed = []
        state = torch.default_generator.get_state()
        try:
            for (_, item), seed in zip(items.items(), draw.seeds("photograph").tolist(), strict=True):
                torch.default_generator.manual_seed(seed)
                crop = v2.RandomResizedCrop(item.shape[:2], scale=(self.area, 1.0), antialias=True)
                picture = colour(flip(crop(item.permute(2, 0, 1))))
                changed.append(picture.permute(1, 2, 0).flatten(0, 1))
        finally:
            torch.default_generator.set_state(state)
        return replace(items, values=torch.cat(changed))
