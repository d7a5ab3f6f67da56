"""Whether an exported model says what the trained one says: real rows, every subset of the modalities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmformer.datasets.dataset import collate
from mmformer.datasets.sources import DecodeError
from mmformer.model import Encoded
from mmformer.objectives import Objective
from mmformer.predict import Predictor
from mmformer.report.predictions import probabilities
from mmformer.runtime import Runtime
from mmformer.runtime.description import FUSED, KEY, Description, beside, embedding_of
from mmformer.runtime.engines import Engine, open_engine
from mmformer.runtime.writing import SCORES
from mmformer.writing import Writing

Samples = Sequence[Mapping[str, Any]]
TIE = 0.05
ROWS = 200
"""So many rows are compared where there are as many."""


class ExportError(ValueError):
    """A file that does not say what the trained model says; the message holds the figures."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What an exported model must keep to, in each subset of the modalities.

    `difference` is the largest between outputs; of numbers that are predicted, in units of the largest where that is
    above 1. `agreement` is the share of samples with the same prediction, or one that the trained model holds for as
    probable up to `TIE`. `cosine` is the least mean between embeddings, or the least correlation between numbers.
    """

    difference: float = 1e-4
    agreement: float = 1.0
    cosine: float = 0.9999


EXACT = Bar()
INT8 = Bar(difference=float("inf"), agreement=0.98, cosine=0.99)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One output on the rows that have all of `modalities`, and nothing else."""

    output: str
    modalities: tuple[str, ...]
    rows: int
    difference: float
    agreement: float | None = None
    cosine: float | None = None

    def keeps(self, bar: Bar) -> bool:
        return (
            self.difference <= bar.difference
            and (self.agreement is None or self.agreement >= bar.agreement)
            and (self.cosine is None or self.cosine >= bar.cosine)
        )

    def line(self) -> str:
        """The figures in words."""
        parts = [f"largest difference {self.difference:.1e}"]
        parts += [] if self.agreement is None else [f"same prediction {self.agreement:.2%}"]
        parts += [] if self.cosine is None else [f"cosine {self.cosine:.6f}"]
        return f"{self.output} of {' + '.join(self.modalities)} ({self.rows} rows): {', '.join(parts)}"


def rows_of(predictor: Predictor, manifest: Path, split: str | None = "test", count: int = ROWS) -> Samples:
    """Raw rows of a manifest, as `Predictor.predict` and `Runtime.predict` take them; of all splits where one is empty.

    Rows of which nothing can be read are left out.
    """
    held = predictor.manifest(manifest, labelled=split is not None)
    with suppress(ValueError):  # no such split
        split = split if len(held.rows(split)) else None
    chosen = held.rows(split)
    samples = []
    for row in chosen[np.linspace(0, len(chosen) - 1, min(count, len(chosen))).astype(np.int64)]:
        sample: dict[str, Any] = {"id": held.id(int(row))}
        for name, feature in predictor.features.items():
            if name in held.modalities:
                with suppress(DecodeError):  # a row that names what is not there lacks it
                    found = held.source(name, int(row)) if feature.from_file else held.text(int(row), name)
                    sample |= {} if found is None else {name: found}
        samples.append(sample)
    batch = collate([_values(sample) for sample in samples], predictor.features, [str(i) for i in range(len(samples))])
    present = batch.present()
    kept = [{"id": s["id"]} | {n: s[n] for n in s if n in have} for s, have in zip(samples, present, strict=True)]
    return [sample for sample in kept if len(sample) > 1]


def compare(predictor: Predictor, objective: Objective | None, runtime: Runtime, samples: Samples) -> list[Compared]:
    """What a file gives beside what the trained model gives, output by output and subset by subset.

    Raises:
        ValueError: no row has any of what the file takes.
    """
    found = []
    for modalities in subsets(runtime.modalities):
        chosen = [{name: s[name] for name in modalities} for s in samples if set(modalities) <= s.keys()]
        wanted = [name for name in runtime.description.outputs if _is_judged(name, modalities, runtime.description)]
        if chosen and wanted:
            theirs = runtime.outputs(chosen)
            ours = _eager(predictor, objective, chosen, wanted)
            found += [_compared(name, modalities, ours[name], theirs[name], runtime.description) for name in wanted]
    if not found:
        raise ValueError(f"no row to check has any of {', '.join(runtime.modalities)}: give other data")
    return found


def compare_texts(predictor: Predictor, runtime: Runtime, samples: Samples, length: int = 16) -> list[Compared]:
    """What a file writes beside what the trained model writes, and the scores of the first token of each."""
    writing = Writing.of(predictor.model, predictor.objectives, predictor.features, predictor.marks)
    chosen = [{name: s[name] for name in runtime.modalities if name in s} for s in samples]
    chosen = [sample for sample in chosen if sample]
    if not chosen:
        raise ValueError(f"no row to check has any of {', '.join(runtime.modalities)}: give other data")
    ours = []
    for sample in chosen:  # one at a time, as the program reads them
        with torch.inference_mode():
            ours.append(writing.writer.read(writing.prompted(collate([sample], predictor.features))).scores)
    theirs = np.concatenate([read[SCORES] for read, _ in runtime.read(chosen)])
    difference = float(np.abs(torch.cat(ours).numpy() - theirs).max())
    pairs = zip(predictor.generate(chosen, length), runtime.generate(chosen, length), strict=True)
    same = float(np.mean([one == other for one, other in pairs]))
    return [Compared(output="texts", modalities=runtime.modalities, rows=len(chosen), difference=difference,
                     agreement=same)]  # fmt: skip


def subsets(modalities: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every subset but the empty one, small ones first."""
    for count in range(1, len(modalities) + 1):
        yield from combinations(modalities, count)


def engine_of(path: Path) -> Engine:
    """What runs a file that was exported, also one that needs torch."""
    if path.suffix == ".pt2":
        return TorchEngine(path)
    return open_engine(path, threads=1)


class TorchEngine:
    """A .pt2 file: of torch.export, or of AOTInductor where a .json lies beside it."""

    def __init__(self, path: Path):
        held = {KEY: ""}
        if beside(path).is_file():
            self._call = torch._inductor.aoti_load_package(str(path))
            held[KEY] = beside(path).read_text(encoding="utf-8")
        else:
            self._call = torch.export.load(path, extra_files=held).module()
        self.description = Description.from_json(held[KEY], str(path))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            found = self._call(*(torch.from_numpy(inputs[name]) for name in self.description.names))
        return {name: out.numpy() for name, out in zip(self.description.outputs, found, strict=True)}


def _is_judged(output: str, modalities: tuple[str, ...], description: Description) -> bool:
    """Whether an output says something of samples that have these modalities alone."""
    for name in description.embedded:
        if output == embedding_of(name) and name != FUSED:
            return modalities == (name,)
    if output == embedding_of(FUSED) or not description.reads:
        return True
    return not set(modalities).isdisjoint(description.reads)


def _eager(
    predictor: Predictor, objective: Objective | None, samples: Samples, outputs: Sequence[str]
) -> dict[str, np.ndarray]:
    """The same outputs of the trained model, from packed rows."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in outputs}
    for start in range(0, len(samples), predictor.batch_size):
        chunk = samples[start : start + predictor.batch_size]
        batch = collate([_values(s) for s in chunk], predictor.features, [str(start + i) for i in range(len(chunk))])
        with torch.inference_mode():
            encoded = predictor.model.encode(batch)
            predicted = {} if objective is None else objective.predict(predictor.model, encoded, batch)
            for name in outputs:
                made = predicted[name] if name in predicted else _embedding(predictor, encoded, name)
                parts[name].append(made.float().numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _embedding(predictor: Predictor, encoded: Encoded, output: str) -> torch.Tensor:
    name = output.removesuffix(embedding_of(""))
    if name in predictor.model.heads:
        return predictor.model.output(encoded, name, source=name)[0]
    return predictor.model.summary(encoded, None if name == FUSED else name)[0]


def _values(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name != "id"}


def _compared(
    output: str, modalities: tuple[str, ...], ours: np.ndarray, theirs: np.ndarray, description: Description
) -> Compared:
    difference = float(np.abs(ours - theirs).max())
    agreement = cosine = None
    if output == "logits":
        agreement = _agreement(ours, theirs, description)
    elif output == "value":
        difference /= max(1.0, float(np.abs(ours).max()))
        cosine = float(_cosine(ours - ours.mean(), theirs - theirs.mean()))
    else:
        cosine = float(_cosine(ours, theirs).mean())
    return Compared(output=output, modalities=modalities, rows=len(ours), difference=difference,
                    agreement=agreement, cosine=cosine)  # fmt: skip


def _agreement(ours: np.ndarray, theirs: np.ndarray, description: Description) -> float:
    """The share of decisions that are the same, or that the trained model finds as good up to `TIE`."""
    shares = probabilities(ours.astype(np.float64), description.kind or "Classes")
    if description.kind == "Labels":
        same = ((ours > 0) == (theirs > 0)) | (np.abs(shares - 0.5) <= TIE)
        return float(same.mean())
    said = np.take_along_axis(shares, theirs.argmax(1)[:, None], 1)[:, 0]
    return float((shares.max(1) - said <= TIE).mean())


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis; 1 where both are zero."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.where(lengths > 0, (a * b).sum(-1) / np.maximum(lengths, 1e-12), 1.0)


def verify(found: Sequence[Compared], bar: Bar, path: Path) -> None:
    """Stop at a file that does not keep to the bar.

    Raises:
        ExportError: some subset is off; the message has the figures of all that are.
    """
    wrong = [compared.line() for compared in found if not compared.keeps(bar)]
    if wrong:
        raise ExportError(
            f"{path.name} does not say what the trained model says, and is removed "
            f"(allowed: difference {bar.difference:.0e}, same prediction {bar.agreement:.0%}, cosine {bar.cosine:g}):\n"
            + "\n".join(f"  {line}" for line in wrong)
        )
