"""The rows of a manifest as batches: decoded, cached, augmented, and every fault accounted for by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from torch import Tensor

from mmformer.batch import Batch, Fault, Ragged
from mmformer.datasets import blackbox
from mmformer.datasets.augment import Augment
from mmformer.datasets.features import Feature
from mmformer.datasets.integrity import unchecked
from mmformer.datasets.labels import Target
from mmformer.datasets.manifest import ABSENT, Manifest
from mmformer.datasets.sources import DecodeError, Source

Key = tuple[int, int]
"""An epoch and an index into the split."""


class DataError(ValueError):
    """A row that cannot be used, under the policy that this stops the run."""


class ManifestDataset:
    """The rows of one split (of all for None), read a batch at a time as a loader does with `__getitems__`.

    Each modality of the manifest that has a feature is read; decoded items are kept up to `cache_bytes`, once for all
    rows that share a file. `targets` names further columns as targets, beside the `label`. What cannot be read is left
    out and listed in the batch's `faults`; a row that has nothing left is dropped, and listed as column "row" if all
    its cells are empty. With `on_error="fail"` any of these stops.

    Raises:
        ManifestError: the split is empty, or the manifest lacks a column.
        DataError: a row that cannot be read, with `on_error="fail"`.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str | None,
        features: Mapping[str, Feature],
        *,
        targets: Mapping[str, Target] | None = None,
        augment: Augment | None = None,
        on_error: Literal["skip", "fail"] = "skip",
        seed: int = 0,
        cache_bytes: int = 1 << 30,
    ):
        if on_error not in ("skip", "fail"):  # from a command line, where no type is checked
            raise ValueError(f"data.on_error={on_error}: give skip or fail")
        self.manifest = manifest.require(*features)
        self.rows = manifest.rows(split)
        self.features = dict(features)
        self.targets = ({"label": manifest.label} if manifest.label else {}) | dict(targets or {})
        self.augment = augment
        self.on_error = on_error
        self.seed = seed
        self._codes = {name: manifest.inputs[name].codes[self.rows] for name in features}
        self._cache = _Cache(cache_bytes)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key | int) -> Batch:
        return self.__getitems__([key if isinstance(key, tuple) else (0, key)])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The batch of these samples; those of which nothing can be read are missing from it."""
        epochs = {epoch for epoch, _ in keys}
        if len(epochs) > 1:
            raise ValueError(f"a batch of the epochs {sorted(epochs)}: a batch belongs to one")
        indices = np.array([index for _, index in keys], dtype=np.int64)
        faults: list[Fault] = []
        found = {name: self._read(name, indices, faults) for name in self.features}
        kept = [i for i in range(len(keys)) if any(items[i] is not None for items in found.values())]
        dropped = self.rows[np.delete(indices, kept)].tolist()
        faults += [self._refused(fault) for fault in _empty(self.manifest, dropped, faults)]
        kept_rows = self.rows[indices[kept]]
        inputs = {}
        for name, items in found.items():
            held = [(row, item) for row, i in enumerate(kept) if (item := items[i]) is not None]
            if held:
                dims = self.features[name].feature_dims
                inputs[name] = Ragged.stack([item for _, item in held], [row for row, _ in held], dims)
        batch = Batch(
            ids=tuple(self.manifest.id(row) for row in kept_rows.tolist()),
            inputs=inputs,
            targets={name: target.rows(kept_rows) for name, target in self.targets.items()},
            faults=tuple(faults),
            epoch=next(iter(epochs), 0),
            indices=tuple(indices[kept].tolist()),
        )
        return self.augment(batch, self.seed) if self.augment else batch

    def size(self, index: int) -> dict[str, int]:
        """About how many tokens each modality of a sample becomes, from file headers; what is broken has none."""
        return {name: int(sizes[index]) for name, sizes in self._sizes.items() if sizes[index]}

    def num_tokens(self) -> list[int]:
        """About how many tokens each sample becomes, over all modalities."""
        return sum(self._sizes.values(), np.zeros(len(self), dtype=np.int64)).tolist()

    @cached_property
    def _sizes(self) -> dict[str, Int[np.ndarray, " N"]]:
        """The tokens of each sample by modality; each file is opened once."""
        return {name: self._sizes_of(name) for name in self.features}

    def _sizes_of(self, name: str) -> Int[np.ndarray, " N"]:
        feature = self.features[name]
        codes, first, place = np.unique(self._codes[name], return_index=True, return_inverse=True)
        sizes = np.zeros(len(codes), dtype=np.int64)
        for i in np.flatnonzero(codes >= 0):
            # Reading a broken one reports why; until then it only counts for nothing.
            with suppress(DecodeError):
                value = _header(self.manifest, feature, name, int(self.rows[first[i]]))
                sizes[i] = 0 if value is None else feature.tokens(feature.shape(value))
        return sizes[place]

    def warm(self) -> None:
        """Decode into the cache what fits, so that workers forked later share it."""
        for name, codes in self._codes.items():
            for code, index in zip(*np.unique(codes, return_index=True), strict=True):
                if code >= 0 and not self._cache.full:
                    self.item(name, int(index))

    def _read(self, name: str, indices: Int[np.ndarray, " B"], faults: list[Fault]) -> list[Tensor | None]:
        """The items of one modality, None where a row has none; what is broken is added to the faults."""
        found: list[Tensor | None] = []
        for index, code in zip(indices.tolist(), self._codes[name][indices].tolist(), strict=True):
            held = None if code == ABSENT else self.item(name, index)
            if isinstance(held, str):
                faults.append(self._refused(_fault(self.manifest, name, int(self.rows[index]), held)))
                held = None
            found.append(held)
        return found

    def item(self, name: str, index: int) -> Tensor | str | None:
        """The item, or the reason why there is none."""
        key = name, int(self._codes[name][index])
        if key in self._cache.items:
            return self._cache.items[key]
        if blackbox.carried():
            row = int(self.rows[index])
            blackbox.note(f"row {self.manifest.id(row)!r}, {self.manifest.where(name, row)}")
        try:
            value = _value(self.manifest, self.features[name], name, int(self.rows[index]))
            held = None if value is None else self.features[name](value)
        except DecodeError as error:
            held = str(error)
        # A reference to no row has no code of its own, and white space is no text: neither is worth keeping.
        if key[1] >= 0 and held is not None:
            self._cache.add(key, held)
        return held

    def _refused(self, fault: Fault) -> Fault:
        """The fault, where the policy is to go on."""
        if self.on_error == "fail":
            raise DataError(
                f"row {fault.id!r}, column {fault.column!r}, {fault.path}: {fault.reason}; mend or remove it, "
                "or leave out what is broken with data.on_error=skip"
            )
        return fault


class _Cache:
    """Items by modality and code, until they fill a number of bytes; then those that are there stay."""

    def __init__(self, limit: int):
        self.items: dict[tuple[str, int], Tensor | str] = {}
        self.limit = limit

    @property
    def full(self) -> bool:
        return self.limit <= 0

    def add(self, key: tuple[str, int], item: Tensor | str) -> None:
        # A reason is kept all the same, or a file that hangs its decoder would do so every epoch.
        if not self.full or isinstance(item, str):
            self.items[key] = item
            self.limit -= item.nbytes if isinstance(item, Tensor) else len(item)


def collate(samples: Sequence[Mapping[str, Any]], features: Mapping[str, Feature], ids: Sequence[str] = ()) -> Batch:
    """A batch of samples in memory: for each modality a path, bytes, PIL image, array (with its rate) or string.

    None and a modality that is not there are absent. What cannot be read is left out and listed in the faults; every
    sample keeps its row.

    Raises:
        ValueError: a sample has a modality without a feature.
    """
    unknown = {name for sample in samples for name in sample} - set(features)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: give {', '.join(features)}")
    names = tuple(ids) or tuple(str(i) for i in range(len(samples)))
    inputs, faults = {}, []
    for modality, feature in features.items():
        held = []
        for row, sample in enumerate(samples):
            value = sample.get(modality)
            if value is None:
                continue
            try:
                held.append((row, feature(value)))
            except DecodeError as error:
                shown = value if isinstance(value, str) and feature.from_file else type(value).__name__
                faults.append(Fault(id=names[row], column=modality, path=shown, reason=str(error)))
        if held:
            rows, items = zip(*held, strict=True)
            inputs[modality] = Ragged.stack(items, rows, feature.feature_dims)
    return Batch(ids=names, inputs=inputs, faults=tuple(faults), indices=tuple(range(len(samples))))


def scan(manifest: Manifest, features: Mapping[str, Feature], split: str | None = None) -> list[Fault]:
    """Check the files of a manifest by their headers, each once, and list every row that has a broken one.

    A row of which every cell is empty is listed too, under the column "row".
    """
    rows = manifest.require(*features).rows(split)
    faults = []
    usable = np.zeros(len(rows), dtype=bool)
    for name, feature in features.items():
        codes = manifest.inputs[name].codes[rows]
        reasons: dict[int, str] = {}
        for code, index in zip(*np.unique(codes, return_index=True), strict=True):
            if code >= 0 and (reason := _broken(manifest, feature, name, int(rows[index]))) is not None:
                reasons[int(code)] = reason
        usable |= (codes >= 0) & ~np.isin(codes, list(reasons))
        for index in np.flatnonzero((codes < ABSENT) | np.isin(codes, list(reasons))):
            if reason := reasons.get(int(codes[index])) or _broken(manifest, feature, name, int(rows[index])):
                faults.append(_fault(manifest, name, int(rows[index]), reason))
    return faults + _empty(manifest, rows[~usable].tolist(), faults)


def _broken(manifest: Manifest, feature: Feature, name: str, row: int) -> str | None:
    """Why a cell cannot be read: "" for white space, None for one that can, as far as its header tells."""
    try:
        value = _header(manifest, feature, name, row)
        if value is None:
            return ""
        feature.shape(value)
    except DecodeError as error:
        return str(error)
    return None


def _empty(manifest: Manifest, rows: Sequence[int], faults: Sequence[Fault]) -> list[Fault]:
    """A fault for each of these rows that no other fault accounts for."""
    known = {fault.id for fault in faults}
    ids = [id for row in rows if (id := manifest.id(row)) not in known]
    return [Fault(id=id, column="row", path="", reason="none of its cells holds anything") for id in ids]


def _value(manifest: Manifest, feature: Feature, name: str, row: int) -> Any:
    return manifest.source(name, row) if feature.from_file else manifest.text(row, name)


def _header(manifest: Manifest, feature: Feature, name: str, row: int) -> Any:
    """The value of a cell of which only the header is read."""
    value = _value(manifest, feature, name, row)
    return unchecked(value) if isinstance(value, Source) else value


def _fault(manifest: Manifest, name: str, row: int, reason: str) -> Fault:
    return Fault(id=manifest.id(row), column=manifest.inputs[name].name, path=manifest.where(name, row), reason=reason)
