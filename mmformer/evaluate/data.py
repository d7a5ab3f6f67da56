"""The samples that a model is judged on: as they are, of some modalities only, or degraded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmformer.batch import Batch
from mmformer.datasets.dataset import ManifestDataset, collate
from mmformer.datasets.decode import decode_audio, decode_image
from mmformer.datasets.degrade import Degradation
from mmformer.datasets.features import Feature, Picture, Waveform
from mmformer.datasets.labels import Target
from mmformer.datasets.manifest import Manifest
from mmformer.datasets.sources import DecodeError

RECORDINGS = 32
"""How many rows lend their recordings for babble."""
CACHE = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The rows of a split (None: all) of a manifest, for the features that the model and the manifest have."""

    manifest: Manifest
    split: str | None
    features: Mapping[str, Feature]
    targets: Mapping[str, Target]
    batch_size: int

    def batches(self) -> Iterator[Batch]:
        """The rows as they are; those of which nothing can be read are missing."""
        data = ManifestDataset(self.manifest, self.split, self.features, targets=self.targets, cache_bytes=CACHE)
        for start in range(0, len(data), self.batch_size):
            batch = data.__getitems__([(0, i) for i in range(start, min(start + self.batch_size, len(data)))])
            if batch.inputs:
                yield batch

    def degraded(self, degradation: Degradation, strength: float) -> Iterator[Batch]:
        """The rows that have the modality of a degradation, after it."""
        rows = self.manifest.rows(self.split)
        targets = ({"label": self.manifest.label} if self.manifest.label else {}) | dict(self.targets)
        for start in range(0, len(rows), self.batch_size):
            chunk = rows[start : start + self.batch_size]
            ids = [self.manifest.id(int(row)) for row in chunk]
            values = [self._values(int(row)) for row in chunk]
            for id, held in zip(ids, values, strict=True):
                given = self._decoded(degradation.modality, held.pop(degradation.modality, None))
                if given is not None:
                    held[degradation.modality] = degradation.apply(given, strength, id)
            batch = collate(values, self.features, ids)
            batch = replace(batch, targets={name: target.rows(chunk) for name, target in targets.items()})
            kept = [i for i, have in enumerate(batch.present()) if degradation.modality in have]
            if kept:
                yield batch.select(kept)

    def recordings(self) -> dict[str, Tensor]:
        """Some recordings of the split by the id of their row, to be mixed into others."""
        found: dict[str, Tensor] = {}
        for row in self.manifest.rows(self.split) if "audio" in self.features else ():
            wave = self._decoded("audio", self._values(int(row)).get("audio"))
            if wave is not None and wave.any():
                found[self.manifest.id(int(row))] = wave
            if len(found) == RECORDINGS:
                break
        return found

    def _values(self, row: int) -> dict[str, Any]:
        """What a row has of each modality: a text, or where its bytes are."""
        values: dict[str, Any] = {}
        for name, feature in self.features.items():
            with suppress(DecodeError):  # a row that is not there has nothing, as in a batch of the rows as they are
                values[name] = self.manifest.source(name, row) if feature.from_file else self.manifest.text(row, name)
        return {name: value for name, value in values.items() if value is not None}

    def _decoded(self, modality: str, value: Any) -> Any:
        """A picture, a waveform or a text as a degradation takes it; None where it cannot be read."""
        feature = self.features[modality]
        if value is None or not feature.from_file:
            return value
        with suppress(DecodeError):  # as above
            if isinstance(feature, Picture):
                return decode_image(value, feature.max_pixels, channels=feature.channels)
            recording = feature if isinstance(feature, Waveform) else getattr(feature, "waveform", None)
            if not isinstance(recording, Waveform):
                raise ValueError(f"{modality} is read by {type(feature).__name__}, which knows no degradation")
            return decode_audio(value, recording.sample_rate, recording.max_seconds)
        return None


def with_all(batch: Batch, modalities: Sequence[str]) -> Batch | None:
    """The samples that have all of these modalities, and nothing else of them; None where no sample does."""
    rows = [i for i, have in enumerate(batch.present()) if have.issuperset(modalities)]
    return batch.select(rows).only(modalities) if rows else None


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of several batches end to end, on the CPU and in float32 where they are floats."""
    found = torch.cat([part.detach().cpu() for part in parts])
    return found.float() if found.is_floating_point() else found
