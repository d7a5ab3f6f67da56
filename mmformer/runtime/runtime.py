"""A trained model in a file of its own: raw samples in, predictions and embeddings out, without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmformer.datasets.sources import DecodeError
from mmformer.runtime.description import FUSED, PRESENT, SIZE, Description, Input, embedding_of
from mmformer.runtime.engines import Engine, open_engine, open_session
from mmformer.runtime.features import Feature, Text, feature_of
from mmformer.runtime.writing import prompt, step_of, write

BATCH = 16
Sample = Mapping[str, Any]
"""Modality -> path, bytes, PIL image, array, (array, sample rate) or, for a text, the string itself; any may be left
out or be None. `id` may name the sample."""
Samples = Sample | Iterable[Any]
"""One sample, or several."""
Items = dict[str, np.ndarray]


class Runtime:
    """What `mmformer export` wrote, opened: it predicts as the trained run does.

        Runtime("model.onnx").predict({"image": "a.png", "audio": "b.wav", "text": "which digit?"})

    Needs numpy, what runs the file, and Pillow, soundfile or tokenizers where it reads pictures, sounds or texts.
    `threads` of one operation, by default one for each core.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, damaged, or what runs it is not installed.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        self._path, self._threads = Path(path), threads
        self._engine = open_engine(self._path, threads)

    @classmethod
    def of(cls, engine: Engine) -> Runtime:
        """A runtime around a program that is open already."""
        made = cls.__new__(cls)
        made._engine = engine
        return made

    @property
    def description(self) -> Description:
        return self._engine.description

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.description.inputs)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.description.labels

    def predict(self, samples: Samples) -> Any:
        """The label (or labels, or number) of one sample, or a list of them for several.

        None for a sample without what the prediction is read off.

        Raises:
            ValueError: a sample with an unknown key, nothing or something unreadable in it; it names the sample. Or a
                file that only embeds.
        """
        rows, outputs = self._judged(samples)
        decided = _decide(outputs, self.description)
        said = [value if self._is_read(row) else None for row, value in zip(rows, decided, strict=True)]
        return said[0] if isinstance(samples, Mapping) else said

    def predict_proba(self, samples: Samples) -> Any:
        """Label -> probability of one sample, or a list of such dicts. Raises as `predict`, and for a regression."""
        if self.description.kind == "Number":
            raise ValueError("this model predicts a number, which has no probabilities: use predict")
        rows, outputs = self._judged(samples)
        shares = [
            dict(zip(self.labels, share.tolist(), strict=True)) if self._is_read(row) else None
            for row, share in zip(rows, _probabilities(outputs, self.description), strict=True)
        ]
        return shares[0] if isinstance(samples, Mapping) else shares

    def embed(self, samples: Samples, modality: str | None = None) -> np.ndarray:
        """One vector a sample, float32: of what is fused, or of one modality. Raises as `predict`.

        `modality` may be left out where the file embeds one alone. A row of NaN stands for a sample without it.
        """
        have = self.description.embedded
        name = modality or (have[0] if len(have) == 1 else FUSED)
        if name not in have:
            raise ValueError(f"no embedding of {name} here: this file gives {', '.join(self.description.outputs)}")
        rows = self._checked(samples)
        found = self.outputs(rows)[embedding_of(name)].astype(np.float32)
        if name != FUSED:
            found[[name not in row for row in rows]] = np.nan
        return found[0] if isinstance(samples, Mapping) else found

    def generate(self, samples: Samples, max_length: int = 64) -> Any:
        """What the model writes about one sample, or a list of texts for several, the likeliest token each time.

        The prompt is what a sample has of the modality that is written. At most `max_length` tokens. Raises as
        `predict`, and for a file that writes nothing.
        """
        rules, texts = self._rules(), []
        feature = self._features[rules["modality"]]
        assert isinstance(feature, Text)
        for read, length in self.read(samples):
            ids = write(read, self._step, length, rules, max_length)
            texts.append(feature.tokenizer.decode(ids))
        return texts[0] if isinstance(samples, Mapping) else texts

    def read(self, samples: Samples) -> Iterator[tuple[Items, int]]:
        """What the first program of a model that writes says of each sample and its prompt, and the prompt's length."""
        rules = self._rules()
        name = rules["modality"]
        for number, sample in enumerate(self._checked(samples)):
            items = self._items(sample, number)
            ids = prompt(items[name].tolist() if name in items else None, rules)
            if ids:
                items[name] = np.array(ids, dtype=np.int64)
            yield self._engine.run(self._filled([items])), len(ids)

    def _rules(self) -> Mapping[str, Any]:
        if self.description.writes is None:
            raise ValueError(f"this file writes no texts: it gives {', '.join(self.description.outputs)}")
        return self.description.writes

    @cached_property
    def _step(self) -> Any:
        """The second program of a model that writes."""
        return open_session(step_of(self._path), self._threads)

    def outputs(self, samples: Iterable[Any]) -> dict[str, np.ndarray]:
        """All that the program gives, a row for each sample."""
        rows = [self._items(sample, number) for number, sample in enumerate(self._checked(samples))]
        out: dict[str, np.ndarray] = {}
        for chosen in self._batches(rows):
            found = self._engine.run(self._filled([rows[i] for i in chosen]))
            for name, values in found.items():
                if name not in out:
                    out[name] = np.zeros((len(rows), *values.shape[1:]), dtype=values.dtype)
                out[name][chosen] = values
        return out

    # ------------------------------------------------------------------ raw samples to tensors

    @cached_property
    def _features(self) -> dict[str, Feature]:
        return {part.name: feature_of(part.feature) for part in self.description.inputs}

    def _checked(self, samples: Samples) -> list[dict[str, Any]]:
        """What samples hold, without what is absent."""
        known, rows = ", ".join(self.modalities), []
        for number, sample in enumerate([samples] if isinstance(samples, Mapping) else samples):
            if not isinstance(sample, Mapping):
                raise ValueError(f"sample {number} is a {type(sample).__name__}: give a dict with any of {known}")
            if unknown := [key for key in sample if key not in self.modalities and key != "id"]:
                raise ValueError(f"sample {number} has the key {unknown[0]!r}: this model takes {known}")
            held = {key: value for key, value in sample.items() if not _is_absent(value)}
            if not held.keys() - {"id"}:
                raise ValueError(f"sample {number} is empty: give at least one of {known}")
            rows.append(held)
        return rows

    def _items(self, sample: Sample, number: int) -> Items:
        items = {}
        for part in self.description.inputs:
            if part.name in sample:
                try:
                    items[part.name] = self._features[part.name](sample[part.name])
                    _check_fits(part, items[part.name])
                except DecodeError as error:
                    raise ValueError(f"sample {sample.get('id', number)}, {part.name}: {error}") from error
        return items

    def _batches(self, rows: Sequence[Items]) -> Iterator[list[int]]:
        """Which samples go through the program together: those whose items may."""
        alike = [part for part in self.description.inputs if not part.ragged and not part.fixed]
        groups: dict[tuple, list[int]] = {}
        for number, items in enumerate(rows):
            key = tuple(items[part.name].shape if part.name in items else None for part in alike)
            groups.setdefault(key, []).append(number)
        size = min(BATCH, self.description.batch or BATCH)
        for group in groups.values():
            yield from (group[start : start + size] for start in range(0, len(group), size))

    def _filled(self, rows: Sequence[Items]) -> Items:
        """The tensors of some samples: items filled up with zeros, and what of them is real."""
        inputs: Items = {}
        for part in self.description.inputs:
            found = [items.get(part.name) for items in rows]
            lengths = [len(item) for item in found if item is not None]
            longest = max([part.least, *lengths]) if part.ragged else max(lengths, default=part.least)
            shape = [part.shape[0] or longest, *part.shape[1:]]
            values = np.zeros((len(rows), *shape), dtype=part.dtype)
            sizes = np.zeros((len(rows), part.axes), dtype=np.int64)
            for row, item in enumerate(found):
                if item is not None:
                    values[(row, *map(slice, item.shape))] = item
                    sizes[row] = item.shape[: part.axes]
            inputs[part.name] = values
            if part.ragged:
                inputs[part.name + SIZE] = sizes
        if len(self.description.inputs) > 1:
            inputs[PRESENT] = np.array([[part.name in items for part in self.description.inputs] for items in rows])
        return inputs

    # ------------------------------------------------------------------ what the outputs say

    def _judged(self, samples: Samples) -> tuple[list[dict[str, Any]], np.ndarray]:
        if self.description.kind is None:
            raise ValueError(f"this file gives {', '.join(self.description.outputs)} and has no labels: use embed")
        rows = self._checked(samples)
        name = "value" if self.description.kind == "Number" else "logits"
        return rows, self.outputs(rows)[name] if rows else np.zeros((0, len(self.labels)), np.float32)

    def _is_read(self, row: Mapping[str, Any]) -> bool:
        return not self.description.reads or any(name in row for name in self.description.reads)


def _check_fits(part: Input, item: np.ndarray) -> None:
    """Stop at an item that the program was not made for.

    Raises:
        DecodeError: of another size, too long or too short.
    """
    size, limits = item.shape[: part.axes], part.largest[: part.axes]
    shown, most = (" x ".join(map(str, numbers)) for numbers in (size, limits))
    if part.fixed and size != limits:
        raise DecodeError(f"its size is {shown}, and this file was exported for {most} alone: export for that size")
    if any(a > b for a, b in zip(size, limits, strict=True)):
        raise DecodeError(f"its size is {shown}, and this file was exported for at most {most}")
    if size[0] < part.shortest:
        raise DecodeError(f"its length is {size[0]}, and this file takes at least {part.shortest}")


def _is_absent(value: Any) -> bool:
    """Whether a cell holds nothing; tables write an empty one as NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _decide(outputs: np.ndarray, description: Description) -> list[Any]:
    """The label, the list of labels (probability above a half) or the number that outputs stand for."""
    if description.kind == "Number":
        return outputs.astype(float).tolist()
    if description.kind == "Classes":
        return [description.labels[i] for i in outputs.argmax(1)]
    return [[description.labels[i] for i in np.flatnonzero(row > 0)] for row in outputs]


def _probabilities(outputs: np.ndarray, description: Description) -> np.ndarray:
    """Softmax for one label of several, sigmoid for any number of labels."""
    outputs = outputs.astype(np.float64)
    if description.kind == "Classes":
        shares = np.exp(outputs - outputs.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)
    return 0.5 * (1 + np.tanh(outputs / 2))
