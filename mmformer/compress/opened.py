"""A run or an exported file behind one face: what it says of raw samples, and one step of it to be timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from mmformer.batch import Batch
from mmformer.compress.costs import operations
from mmformer.datasets.dataset import collate
from mmformer.export.check import engine_of
from mmformer.objectives import Objective
from mmformer.predict import Predictor, find_model, load
from mmformer.runtime import Runtime
from mmformer.runtime.description import embedding_of

FILES = (".onnx", ".pte", ".pt2")
Samples = Sequence[Mapping[str, Any]]
"""Raw rows, as `Predictor.predict` and `Runtime.predict` take them."""
Outputs = dict[str, np.ndarray]


@runtime_checkable
class Opened(Protocol):
    """Something that predicts; `parameters` and `operations` of one sample are None where a file does not tell."""

    @property
    def path(self) -> Path: ...
    @property
    def size(self) -> int:
        """Bytes on disk of all it needs."""
        ...

    @property
    def parameters(self) -> int | None: ...

    def operations(self, samples: Samples) -> int | None:
        """Multiplications and additions of one pass over some samples."""
        ...

    def outputs(self, samples: Samples) -> Outputs:
        """`logits` or `value`, or an embedding of each modality (NaN where a sample lacks it), a row a sample."""
        ...

    def step(self, samples: Samples) -> Callable[[], object]:
        """One pass over some samples, read and made into tensors beforehand."""
        ...


class OpenedRun:
    """A trained run in PyTorch; its samples are packed, as in training."""

    def __init__(self, path: Path, predictor: Predictor | None = None):
        self.path, self.predictor = path, predictor or load(path)

    @property
    def size(self) -> int:
        return sum(file.stat().st_size for file in find_model(self.path).iterdir())

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.predictor.model.parameters())

    @cached_property
    def _judge(self) -> Objective | None:
        return next((part for part in self.predictor.objectives.values() if hasattr(part, "target")), None)

    def operations(self, samples: Samples) -> int:
        return operations(self.predictor.model, self._batch(samples))

    def outputs(self, samples: Samples) -> Outputs:
        size = self.predictor.batch_size
        parts = [self._said(self._batch(samples[i : i + size])) for i in range(0, len(samples), size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def step(self, samples: Samples) -> Callable[[], object]:
        batch = self._batch(samples)
        return lambda: self._said(batch)

    @torch.inference_mode()
    def _said(self, batch: Batch) -> Outputs:
        model = self.predictor.model
        encoded = model.encode(batch)
        if self._judge is not None:
            said = self._judge.predict(model, encoded, batch)
            return {name: said[name].float().numpy() for name in ("logits", "value") if name in said}
        out = {}
        for name in model.encoders:
            vector, present = model.output(encoded, name, source=name) if name in model.heads else model.summary(
                encoded, name
            )  # fmt: skip
            out[embedding_of(name)] = torch.where(present[:, None].bool(), vector.float(), torch.nan).numpy()
        return out

    def _batch(self, samples: Samples) -> Batch:
        held = [{name: value for name, value in sample.items() if name != "id"} for sample in samples]
        return collate(held, self.predictor.features, [str(i) for i in range(len(held))])


class OpenedFile:
    """An exported file on one thread."""

    parameters = None

    def __init__(self, path: Path):
        self.path = path
        self._engine = engine_of(path)
        self.runtime = Runtime.of(self._engine)

    @property
    def size(self) -> int:
        beside = self.path.with_suffix(".json")
        return self.path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)

    def operations(self, samples: Samples) -> None:
        return None

    def outputs(self, samples: Samples) -> Outputs:
        known = set(self.runtime.modalities)
        rows = [{name: value for name, value in sample.items() if name in known} for sample in samples]
        found = self.runtime.outputs(rows)
        kept = {name: found[name].astype(np.float32) for name in ("logits", "value") if name in found}
        if kept:
            return kept
        for name in known & set(self.runtime.description.embedded):
            vectors = found[embedding_of(name)].astype(np.float32)
            vectors[[name not in row for row in rows]] = np.nan
            kept[embedding_of(name)] = vectors
        return kept

    def step(self, samples: Samples) -> Callable[[], object]:
        known = set(self.runtime.modalities)
        rows = [{name: value for name, value in sample.items() if name in known} for sample in samples]
        inputs: list[Any] = []
        recorder = _Recorder(self._engine, inputs)
        Runtime.of(recorder).outputs(rows)
        return lambda: [self._engine.run(given) for given in inputs]


class _Recorder:
    """An engine that also notes what it was given."""

    def __init__(self, engine: Any, given: list[Any]):
        self.engine, self.given, self.description = engine, given, engine.description

    def run(self, inputs: Mapping[str, np.ndarray]) -> Outputs:
        self.given.append(dict(inputs))
        return self.engine.run(inputs)


def open_any(path: Path) -> Opened:
    """A run or its `model/`, or a file that `mmformer export` wrote.

    Raises:
        FileNotFoundError: there is no such run or file.
        ValueError: it is damaged, or something else.
    """
    return OpenedFile(path) if path.suffix in FILES else OpenedRun(path)
