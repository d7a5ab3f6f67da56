"""`predictions.parquet`: what a trained model said about every sample of a split, one row a sample.

| column | holds |
|---|---|
| `id`, `split` | the row of the manifest, and its split |
| `target`, `prediction` | a label, a list of labels, a number, or a list of texts, one for each turn |
| `prediction_<subset>` | the same from a subset of the modalities (`t`, `ia`, ...); null where the sample lacks one |
| `confidence` | probability of the predicted label |
| `probabilities` | of every label, in the order of the labels in the file's metadata; left out above 200 labels |
| `top` | the five most probable labels with their probabilities |
| `loss` | cross-entropy, mean binary cross-entropy, squared error, or the character error rate of texts |
| `rank_<a>2<b>` | retrieval from one modality to another (`rank_t2i`): at which rank the sample found itself, from 1 |
| `found_<a>2<b>` | and the five samples that came first, each with its `id` and its `score`, a cosine |
| `fault` | what of the sample could not be read |
| others | the manifest's own columns, `text` among them; media as references |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int, Shaped

from mmformer.metrics.text import error_counts
from mmformer.report.retrieval import Retrieval, Retrieved

FILE = "predictions.parquet"
MOST_PROBABILITIES = 200
TOP = 5
OWN = frozenset({"id", "split", "target", "prediction", "confidence", "probabilities", "top", "loss", "fault"})

Kind = Literal["Classes", "Labels", "Number", "Texts"]
"""One label of several, any number of labels, a number, or texts that were written."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model said about samples: logits of each label, or a number.

    `targets` are label indices (-100 where missing), rows of 0 and 1, or numbers (NaN where missing), as in a batch.
    `present` says which samples had something to read; None for all of them.
    """

    ids: tuple[str, ...]
    outputs: Float[np.ndarray, "N ..."]
    targets: Shaped[np.ndarray, "N ..."]
    present: Bool[np.ndarray, " N"] | None = None

    @property
    def kind(self) -> Kind:
        if self.outputs.ndim == 1:
            return "Number"
        return "Labels" if self.targets.ndim == 2 else "Classes"

    @property
    def known(self) -> Bool[np.ndarray, " N"]:
        """Which samples have a target."""
        if self.kind == "Classes":
            return self.targets >= 0
        return np.asarray(~np.isnan(self.targets.reshape(len(self.ids), -1)).any(axis=1))

    @property
    def answered(self) -> Bool[np.ndarray, " N"]:
        return np.ones(len(self.ids), dtype=bool) if self.present is None else self.present


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a model wrote about samples, a text for each turn, beside what is wanted."""

    ids: tuple[str, ...]
    written: tuple[list[str], ...]
    wanted: tuple[list[str], ...]

    @property
    def kind(self) -> Kind:
        return "Texts"


def probabilities(outputs: Float[np.ndarray, "N C"], kind: Kind) -> Float[np.ndarray, "N C"]:
    """Softmax for one label of several, sigmoid for any number of labels."""
    if kind == "Classes":
        exp = np.exp(outputs - outputs.max(1, keepdims=True))
        return exp / exp.sum(1, keepdims=True)
    return 0.5 * (1 + np.tanh(outputs / 2))


def sample_losses(answers: Answers) -> Float[np.ndarray, " N"]:
    """The loss of each sample; NaN without a target or an answer."""
    out, target = answers.outputs.astype(np.float64), answers.targets
    if answers.kind == "Number":
        losses = (out - target) ** 2
    elif answers.kind == "Labels":
        losses = (np.logaddexp(0, out) - out * target).mean(1)
    else:
        top = out.max(1, keepdims=True)
        total = top[:, 0] + np.log(np.exp(out - top).sum(1))
        losses = total - out[np.arange(len(out)), np.maximum(target, 0)]
    return np.where(answers.known & answers.answered, losses, np.nan)


def decide(outputs: Float[np.ndarray, "N ..."], kind: Kind, labels: Sequence[str]) -> list[Any]:
    """The label, the list of labels (probability above a half) or the number that outputs stand for."""
    if kind == "Number":
        return outputs.astype(float).tolist()
    if kind == "Classes":
        return [labels[i] for i in outputs.argmax(1)]
    return [[labels[i] for i in np.flatnonzero(row > 0).tolist()] for row in outputs]


def wanted(answers: Answers, labels: Sequence[str]) -> list[Any]:
    """The targets in words; None where missing."""
    if answers.kind == "Classes":
        return [labels[int(i)] if i >= 0 else None for i in answers.targets]
    if answers.kind == "Number":
        return [float(x) if known else None for x, known in zip(answers.targets, answers.known, strict=True)]
    return [
        [labels[i] for i in np.flatnonzero(row > 0.5).tolist()] if known else None
        for row, known in zip(answers.targets, answers.known, strict=True)
    ]


def write_predictions(
    run: Path,
    answers: Mapping[str, Answers] | Mapping[str, Texts],
    labels: Sequence[str] = (),
    rows: Mapping[str, Mapping[str, Any]] | None = None,
    faults: Mapping[str, str] | None = None,
    split: str = "test",
    retrieved: Mapping[str, Retrieved] | None = None,
) -> Path:
    """Write `predictions.parquet` into a run folder.

    `answers[""]` are from everything a sample has; the other keys are subsets of the modalities by their initials.
    `labels` name the columns of the outputs. `rows[id]` holds the manifest's columns of a sample, `faults[id]` says
    what of it could not be read. `retrieved` is by direction (`t2i`); without answers it gives the samples itself.

    Raises:
        ValueError: no answers from all modalities, or another number of labels than of outputs.
    """
    labels, retrieved = [str(label) for label in labels], retrieved or {}
    ids = answers[""].ids if "" in answers else tuple(dict.fromkeys(i for part in retrieved.values() for i in part.ids))
    columns: dict[str, Any] = {"id": list(ids), "split": [split] * len(ids)}
    about: dict[str, Any] = {"directions": {name: (part.query, part.key) for name, part in retrieved.items()}}
    if answers or not retrieved:
        if "" not in answers:
            raise ValueError(f"answers only for subsets {sorted(answers)}: give those from all modalities too (key '')")
        full = answers[""]
        said = {subset: part for subset, part in answers.items() if isinstance(part, Answers)}
        columns |= _text_columns(full, answers) if isinstance(full, Texts) else _answer_columns(full, said, labels)
        about |= {"kind": full.kind, "labels": labels, "subsets": [s for s in answers if s]}
    for direction, part in retrieved.items():
        columns |= part.columns(direction, ids)
    columns["fault"] = [(faults or {}).get(id) for id in ids]
    extra = _manifest_columns(ids, rows or {}, columns.keys())
    about["extra"] = list(extra)
    table = pa.table(columns | extra).replace_schema_metadata({"mmformer": json.dumps(about)})
    run.mkdir(parents=True, exist_ok=True)
    temporary = run / f".{FILE}.tmp"
    pq.write_table(table, temporary, compression="zstd")
    return temporary.replace(run / FILE)


def _text_columns(full: Texts, answers: Mapping[str, Any]) -> dict[str, Any]:
    columns: dict[str, Any] = {"target": list(full.wanted)}
    for subset, part in answers.items():
        written = dict(zip(part.ids, part.written, strict=True))
        columns[f"prediction_{subset}" if subset else "prediction"] = [written.get(id) for id in full.ids]
    counts = [error_counts(*pair).sum(0) for pair in zip(full.written, full.wanted, strict=True)]
    return columns | {"loss": np.array([edits / max(1, length) for edits, length in counts], dtype=np.float32)}


def _answer_columns(full: Answers, answers: Mapping[str, Answers], labels: Sequence[str]) -> dict[str, Any]:
    if full.kind != "Number" and full.outputs.shape[1] != len(labels):
        raise ValueError(f"{full.outputs.shape[1]} outputs but {len(labels)} labels: give one name for each output")
    columns: dict[str, Any] = {"target": wanted(full, labels)}
    for subset, part in answers.items():
        decided = zip(part.ids, decide(part.outputs, part.kind, labels), part.answered, strict=True)
        said = {id: answer for id, answer, answered in decided if answered}
        columns[f"prediction_{subset}" if subset else "prediction"] = [said.get(id) for id in full.ids]
    if full.kind != "Number":
        columns |= _probability_columns(full, labels)
    return columns | {"loss": sample_losses(full).astype(np.float32)}


def _probability_columns(answers: Answers, labels: Sequence[str]) -> dict[str, Any]:
    shares = probabilities(answers.outputs.astype(np.float64), answers.kind)
    order = np.argsort(-shares, axis=1, kind="stable")[:, :TOP]
    top = [
        [{"label": labels[i], "probability": float(row[i])} for i in best]
        for row, best in zip(shares, order, strict=True)
    ]
    columns: dict[str, Any] = {"confidence": shares.max(1).astype(np.float32), "top": top}
    if len(labels) <= MOST_PROBABILITIES:
        columns["probabilities"] = list(shares.astype(np.float32))
    return columns


def _manifest_columns(
    ids: Sequence[str], rows: Mapping[str, Mapping[str, Any]], taken: Sequence[str] | Any
) -> dict[str, list[str | None]]:
    """The manifest's columns as text, without those that have a place already and without raw bytes."""
    names = dict.fromkeys(name for id in ids for name in rows.get(id, {}) if name not in OWN and name not in taken)
    out = {}
    for name in names:
        cells = [rows.get(id, {}).get(name) for id in ids]
        if not any(isinstance(cell, bytes) for cell in cells):
            out[name] = [None if cell is None else str(cell) for cell in cells]
    return out


@dataclass(frozen=True)
class Predictions:
    """The answers in `predictions.parquet`, read; `extra` names the columns that come from the manifest."""

    table: pa.Table
    kind: Kind
    labels: tuple[str, ...]
    subsets: tuple[str, ...]
    extra: tuple[str, ...]

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> list[Any]:
        return self.table[name].to_pylist()

    def rows(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Samples by their place, each a dict of its columns."""
        return self.table.take(pa.array(places, pa.int64())).to_pylist()

    def scores(self, subset: str = "") -> Float[np.ndarray, " N"]:
        """How good each answer is, NaN where there is none: 1 for right and 0 for wrong, or the absolute error.

        Of several texts of a sample the share that is right.
        """
        said = self.column(f"prediction_{subset}" if subset else "prediction")
        out = np.full(len(said), np.nan)
        for i, (answer, target) in enumerate(zip(said, self.column("target"), strict=True)):
            if answer is not None and target is not None:
                out[i] = self._score(answer, target)
        return out

    def _score(self, answer: Any, target: Any) -> float:
        if self.kind == "Texts":
            return float(np.mean([one == other for one, other in zip(answer, target, strict=True)]))
        return abs(answer - target) if self.kind == "Number" else float(answer == target)

    def counts(self, metric: str, subset: str = "") -> Int[np.ndarray, "n 2"]:
        """What a metric of texts divides, of each sample that has any: texts that are right and all of them (`exact`),
        edits and letters (`cer`), edits and words (`wer`).

        Raises:
            KeyError: another metric.
        """
        count = COUNTED[metric]
        said = self.column(f"prediction_{subset}" if subset else "prediction")
        pairs = zip(said, self.column("target"), strict=True)
        found = [count(written, wanted).sum(0) for written, wanted in pairs if written is not None]
        return np.array(found, dtype=np.int64).reshape(len(found), 2)


def _exact(written: Sequence[str], wanted: Sequence[str]) -> Int[np.ndarray, "n 2"]:
    return np.array([(one == other, 1) for one, other in zip(written, wanted, strict=True)], dtype=np.int64)


def _by_word(written: Sequence[str], wanted: Sequence[str]) -> Int[np.ndarray, "n 2"]:
    return error_counts([text.split() for text in written], [text.split() for text in wanted])


COUNTED = {"exact": _exact, "cer": error_counts, "wer": _by_word}
"""What each metric of texts divides, of each text."""


def read_predictions(run: Path) -> Predictions | None:
    """The answers that `write_predictions` wrote; None where it wrote none.

    Raises:
        ValueError: the file is damaged or of another program.
    """
    table, about = _read(run)
    if table is None or "kind" not in about:
        return None
    return Predictions(table, about["kind"], *(tuple(about[name]) for name in ("labels", "subsets", "extra")))


def read_retrieval(run: Path) -> Retrieval | None:
    """The retrieval that `write_predictions` wrote; None where it wrote none. Raises as `read_predictions`."""
    table, about = _read(run)
    if table is None or not about.get("directions"):
        return None
    directions = {name: (query, key) for name, (query, key) in about["directions"].items()}
    return Retrieval(table, directions, tuple(about["extra"]))


def _read(run: Path) -> tuple[pa.Table | None, dict[str, Any]]:
    path = run / FILE
    if not path.exists():
        return None, {}
    try:
        table = pq.read_table(path)
        return table, json.loads((table.schema.metadata or {})[b"mmformer"])
    except (pa.ArrowInvalid, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or was not written by mmformer ({error}): run the test again") from error
