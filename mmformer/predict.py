"""A trained model that takes what people have: paths, pictures, arrays, strings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmformer.batch import Batch
from mmformer.checkpoints import SavedModel, build, load_model
from mmformer.datasets.chat import Conversation, Marks, Turn, chat_batch
from mmformer.datasets.dataset import ManifestDataset, collate
from mmformer.datasets.features import Feature
from mmformer.datasets.labels import Target
from mmformer.datasets.manifest import Manifest, read_manifest
from mmformer.datasets.tables import ManifestError, read_table
from mmformer.datasets.tokenizers import load_tokenizer
from mmformer.generation import GREEDY, Search
from mmformer.model import Encoded, Model
from mmformer.objectives import Labels, Objective
from mmformer.report.predictions import Kind, decide, probabilities
from mmformer.training.evaluation import Evaluation
from mmformer.writing import Writing, turns_of

BATCH = 64
AUTO = "auto"
"""In place of a column's name: the one that is called like what it is for."""
CACHE = 1 << 28
"""Bytes of decoded items that are kept, as the rows of a manifest often share files."""
NOTHING = "nothing that the model reads"

Sample = Mapping[str, Any]
"""Modality -> path, bytes, PIL image, array, (array, sample rate) or, for a text, the string itself.

Any modality may be left out or be None; `id` may name the sample.
"""
Samples = Sample | Iterable[Any] | str | Path
"""One sample, several, or the path of a manifest. A pandas table is taken row by row."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says about one sample.

    `prediction` is a label, a list of labels or a number by what the model was trained for, and None where nothing of
    the sample could be read; `fault` says what could not be. `probabilities` are by label.
    """

    id: str
    prediction: Any
    probabilities: dict[str, float] | None = None
    fault: str | None = None


class Predictor:
    """A model with the features that turn raw samples into its inputs, both as in training, in evaluation mode.

    `targets` says of each target what kind it is and what its labels are called (`{"kind": .., "names": [..]}`),
    `columns` and `references` how the manifest of training was read, for others like it; `marks` are the ids around the
    turns of conversations, where it was trained on them.
    """

    def __init__(
        self,
        model: Model,
        objectives: Mapping[str, Objective],
        features: Mapping[str, Feature],
        targets: Mapping[str, Mapping[str, Any]],
        *,
        columns: Mapping[str, str | None] | None = None,
        references: Mapping[str, str] | None = None,
        batch_size: int = BATCH,
        marks: Marks | None = None,
    ):
        self.model, self.objectives, self.features = model.eval(), dict(objectives), dict(features)
        self.targets = dict(targets)
        self.columns, self.references, self.batch_size = dict(columns or {}), dict(references or {}), batch_size
        self.marks = marks

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.features)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the outputs of the objective that predicts are called; none for a number."""
        target = getattr(self._judge()[1], "target", None)
        return tuple(self.targets[target]["names"]) if target in self.targets else ()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> Predictor:
        """The same predictor, its weights moved to another device."""
        for module in (self.model, *self.objectives.values()):
            module.to(device)
        return self

    def predict(self, samples: Samples) -> Any:
        """The label (or labels, or number) of one sample, or a list of them for several or for a manifest.

        Raises:
            ValueError: a sample with an unknown key, nothing readable, or in memory a broken file; it names the sample.
        """
        said = [answer.prediction for answer in self.answer(samples, strict=not isinstance(samples, str | Path))]
        return said[0] if isinstance(samples, Mapping) else said

    def predict_proba(self, samples: Samples) -> Any:
        """Label -> probability of one sample, or a list of such dicts. Raises as `predict`, and for a regression."""
        answers = self.answer(samples, strict=not isinstance(samples, str | Path))
        if any(answer.probabilities is None and answer.prediction is not None for answer in answers):
            raise ValueError("this model predicts a number, which has no probabilities: use predict")
        shares = [answer.probabilities for answer in answers]
        return shares[0] if isinstance(samples, Mapping) else shares

    def answer(self, samples: Samples, strict: bool = True) -> list[Answer]:
        """Predictions with their probabilities. Without `strict`, what cannot be read is a fault of its sample only."""
        _, objective = self._judge()
        out: list[Answer] = []
        for ids, batch in self._batches(samples, strict):
            said: dict[str, Answer] = {}
            if batch.inputs:
                with torch.inference_mode():
                    found = objective.predict(self.model, self._encode(batch), batch.to(self.device))
                said = {answer.id: answer for answer in self._answers(found, batch)}
            faults = _faults(batch)
            out += [said.get(id) or Answer(id=id, prediction=None, fault=faults.get(id, NOTHING)) for id in ids]
        return out

    def embed(self, samples: Samples, modality: str | None = None) -> Float[Tensor, "*N D"]:
        """One vector a sample: of what is fused, or of one modality (by its head where it has one, as for retrieval).

        A row of NaN stands for a sample without that modality.
        """
        if modality is not None and modality not in self.model.encoders:
            raise ValueError(f"no modality {modality!r}: this model has {', '.join(self.model.encoders)}")
        rows = []
        for ids, batch in self._batches(samples, strict=True):
            with torch.inference_mode():
                encoded = self._encode(batch)
                if modality is not None and modality in self.model.heads:
                    vector, present = self.model.output(encoded, modality, source=modality)
                else:
                    vector, present = self.model.summary(encoded, modality)
            place = {id: row for row, id in enumerate(batch.ids)}
            found = torch.where(present[:, None].bool(), vector.float(), torch.nan).cpu()
            absent = (
                torch.full_like(found[:1], torch.nan)[0] if len(found) else torch.full((vector.shape[1],), torch.nan)
            )
            rows += [found[place[id]] if id in place else absent for id in ids]
        return rows[0] if isinstance(samples, Mapping) else torch.stack(rows)

    def generate(self, samples: Samples, max_length: int = 64, search: Search = GREEDY, **limits: Any) -> Any:
        """What the model writes about one sample, or a list of texts for several or for a manifest.

        The prompt is what a sample has of the modality that is written, as the question in front of an answer; the
        least one where it has none. At most `max_length` tokens; further `limits` as in `mmformer.generation.Limits`.
        A search that finds several texts gives a list for each sample. None where nothing of a sample can be read.

        Raises:
            ValueError: the model writes no texts; or as `predict`.
        """
        writing = self._writing()
        out: list[Any] = []
        for ids, batch in self._batches(samples, strict=not isinstance(samples, str | Path)):
            prompts = writing.prompted(batch.to(self.device)) if len(batch) else batch
            found = writing.write(prompts, writing.limits(max_length, **limits), search) if len(batch) else []
            said = dict(zip(batch.ids, found, strict=True))
            out += [said.get(id) for id in ids]
        texts = [found[0] if found and len(found) == 1 else found for found in out]
        return texts[0] if isinstance(samples, Mapping) else texts

    def chat(
        self,
        turns: Sequence[str | Turn],
        media: Mapping[str, Sequence[Any]] | None = None,
        max_length: int = 64,
        search: Search = GREEDY,
        **limits: Any,
    ) -> str:
        """What the assistant answers to the last of the `turns`, which are the user's and its own by turns.

        `<image>` in a user's text stands for the next of `media["image"]`, and so on. Options as in `generate`.

        Raises:
            ValueError: a model that was not trained on conversations, turns that do not fit the media, or such as
                cannot be read.
        """
        held = {name: [str(v) if isinstance(v, Path) else v for v in items] for name, items in (media or {}).items()}
        return self.reply([Conversation(turns=turns_of(turns), media=held)], max_length, search, **limits)[0]

    def reply(
        self, conversations: Sequence[Conversation], max_length: int = 64, search: Search = GREEDY, **limits: Any
    ) -> list[str]:
        """What the assistant answers to the last turn of each of several conversations. Options as in `generate`.

        Raises:
            ValueError: as in `chat`.
        """
        if self.marks is None:
            raise ValueError("this model was not trained on conversations: use generate")
        writing = self._writing()
        batch = chat_batch(conversations, self.features, self.marks)
        if batch.faults:
            raise ValueError(batch.faults[0].reason)
        found = writing.write(batch.to(self.device), writing.limits(max_length, **limits), search)
        return [texts[0] for texts in found]

    def evaluate(self, manifest: str | Path, split: str | None = "test", by_subset: bool = True) -> dict[str, float]:
        """The metrics of the objectives on a split of a manifest (None: on all of it), named as a run names them.

        `by_subset` adds those of every subset of the modalities (`acc_ti`).

        Raises:
            ManifestError: no such file or split, or a label that the model does not know.
        """
        rows = self.manifest(manifest, labelled=True)
        targets = {
            name: rows.read_target(name, known["kind"], known["names"] or None)
            for name, known in self.targets.items()
            if name != "label" and name in rows.table.columns
        }
        held = {*targets, *(["label"] if rows.label is not None else [])}
        judged = {
            name: part for name, part in self.objectives.items() if getattr(part, "target", None) in {None, *held}
        }
        if not judged:
            raise ManifestError(f"{manifest} has none of the columns {', '.join(self.targets)} to judge by")
        evaluation = Evaluation(judged, list(self.model.encoders), by_subset)
        for _, batch in self._manifest_batches(rows, split, targets):
            if len(batch):
                batch = batch.to(self.device)
                with torch.inference_mode():
                    evaluation.update(list(evaluation.judge(judged, self.model, self._encode(batch), batch)))
        return evaluation.compute()

    def _judge(self) -> tuple[str, Objective]:
        """The objective that predicts: the first with a target."""
        for name, objective in self.objectives.items():
            if hasattr(objective, "target"):
                return name, objective
        raise ValueError(f"this model was trained for {', '.join(self.objectives)}, which have no labels: use embed")

    def _writing(self) -> Writing:
        return Writing.of(self.model, self.objectives, self.features, self.marks)

    def _encode(self, batch: Batch) -> Encoded:
        return self.model.encode(batch.to(self.device))

    def _answers(self, found: Mapping[str, Tensor], batch: Batch) -> Iterator[Answer]:
        outputs = found["logits" if "logits" in found else "value"].float().cpu().numpy()
        present, readable, faults = found["present"].tolist(), batch.present(), _faults(batch)
        kind = self._kind(outputs.ndim)
        said = decide(outputs, kind, self.labels)
        shares = None if kind == "Number" else probabilities(outputs.astype("float64"), kind)
        for row, id in enumerate(batch.ids):
            if present[row] and readable[row]:
                by_label = None if shares is None else dict(zip(self.labels, shares[row].tolist(), strict=True))
                yield Answer(id=id, prediction=said[row], probabilities=by_label, fault=faults.get(id))

    def _kind(self, dims: int) -> Kind:
        return "Number" if dims == 1 else "Labels" if isinstance(self._judge()[1], Labels) else "Classes"

    # ------------------------------------------------------------------ raw samples to batches

    def _batches(self, samples: Samples, strict: bool) -> Iterator[tuple[tuple[str, ...], Batch]]:
        """The ids of some samples, and their batch, which may lack those of a manifest that have nothing readable."""
        if isinstance(samples, str | Path):
            yield from self._manifest_batches(self.manifest(samples, labelled=False), None)
            return
        rows = [self._checked(sample, number) for number, sample in enumerate(_rows(samples))]
        for start in range(0, len(rows), self.batch_size):
            chunk = rows[start : start + self.batch_size]
            ids = tuple(str(sample.pop("id", start + i)) for i, sample in enumerate(chunk))
            batch = collate(chunk, self.features, ids)
            if strict and batch.faults:
                fault = batch.faults[0]
                raise ValueError(f"sample {fault.id}, {fault.column} {fault.path}: {fault.reason}")
            yield ids, batch

    def _checked(self, sample: Any, number: int) -> dict[str, Any]:
        """What a sample holds, without what is absent."""
        known = ", ".join(self.features)
        if not isinstance(sample, Mapping):
            raise ValueError(f"sample {number} is a {type(sample).__name__}: give a dict with any of {known}")
        if unknown := [key for key in sample if key not in self.features and key != "id"]:
            raise ValueError(f"sample {number} has the key {unknown[0]!r}: this model takes {known}")
        held = {str(k): str(v) if isinstance(v, Path) else v for k, v in sample.items() if _given(v)}
        if not held.keys() - {"id"}:
            raise ValueError(f"sample {number} is empty: give at least one of {known}")
        return held

    def manifest(self, path: str | Path, labelled: bool) -> Manifest:
        """A manifest read with the columns of training, as far as it has them.

        Where the manifest that a column refers to is not beside this one, its cells are taken for paths.
        """
        path = Path(path)
        have = read_table(path).columns
        columns = {role: name for role, name in self.columns.items() if name is None or name in have}
        beside = path if path.is_dir() else path.parent
        named = {role for role in self.references if columns.get(role, role) in have}
        references = {r: to for r, to in self.references.items() if r in named and (beside / _file(to)).is_file()}
        if not labelled:
            return read_manifest(path, columns | {"label": None, "split": None}, references=references)
        known = self.targets.get("label", {})
        kind, names = known.get("kind"), known.get("names")
        return read_manifest(path, columns, references=references, kind=kind, label_names=names or None)

    def _manifest_batches(
        self, manifest: Manifest, split: str | None, targets: Mapping[str, Target] | None = None
    ) -> Iterator[tuple[tuple[str, ...], Batch]]:
        features = {name: feature for name, feature in self.features.items() if name in manifest.modalities}
        if not features:
            raise ManifestError(f"{manifest.path} has none of the columns {', '.join(self.features)} of this model")
        rows = ManifestDataset(manifest, split, features, targets=targets, cache_bytes=CACHE)
        for start in range(0, len(rows), self.batch_size):
            chunk = range(start, min(start + self.batch_size, len(rows)))
            ids = tuple(manifest.id(int(rows.rows[i])) for i in chunk)
            yield ids, rows.__getitems__([(0, i) for i in chunk])


def _rows(samples: Any) -> list[Any]:
    if isinstance(samples, Mapping):
        return [samples]
    if hasattr(samples, "to_dict"):  # a pandas table
        return samples.to_dict("records")
    return list(samples)


def _file(reference: str) -> str:
    return reference.rpartition(":")[0]


def _faults(batch: Batch) -> dict[str, str]:
    """What of each sample could not be read."""
    found: dict[str, str] = {}
    for fault in (fault for fault in batch.faults if fault.column != "row"):  # an empty row is no fault of a file
        line = f"{fault.column} {fault.path}: {fault.reason}"
        found[fault.id] = f"{found[fault.id]}; {line}" if fault.id in found else line
    return found


def _given(value: Any) -> bool:
    """Whether a cell holds something; tables write an empty one as NaN."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def load(
    where: str | Path, allow: Sequence[str] = (), trust: bool = False, device: str | torch.device = "cpu"
) -> Predictor:
    """Open a trained model: the folder of a run, its `model/`, or the weights file in it.

    `allow` names packages of your own that the model uses; `trust` lets its config call anything.

    Raises:
        FileNotFoundError: no such run, or a file of it is missing; the message names it.
        ValueError: a file is damaged, or asks for code outside mmformer.
    """
    folder = find_model(Path(where))
    saved = load_model(folder, allow, trust)
    config, origin = saved.config, str(folder / "config.json")
    return Predictor(
        saved.model,
        saved.objectives,
        _features(saved, allow, trust, origin),
        config["facts"]["targets"],
        columns={role: name for role, name in config.get("columns", {}).items() if name != AUTO},
        references=config.get("references"),
        marks=Marks(**chat) if (chat := config["facts"].get("chat")) else None,
    ).to(device)


def find_model(where: Path) -> Path:
    """The folder with the weights of a run, of a folder or of a file."""
    if where.is_file():
        if where.name == "model.safetensors":
            return where.parent
        raise ValueError(f"{where} is no trained model: give the folder of its run, or model/model.safetensors")
    if not where.exists():
        raise FileNotFoundError(f"{where} does not exist: `mmformer runs` lists the runs")
    if (where / "config.json").is_file() or (where / "SHA256SUMS").is_file():
        return where
    if not (where / "model").exists() and (where / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{where} has no model/ yet, as its training did not finish: python train.py resume={where}"
        )
    return where / "model"


def _features(saved: SavedModel, allow: Sequence[str], trust: bool, origin: str) -> dict[str, Feature]:
    """The features of each modality that the model reads; one that is waiting for the tokenizer gets it."""
    features = {}
    for name, part in saved.config["features"].items():
        if name not in saved.model.encoders:
            continue
        feature = build(part, allow, trust, origin)
        if isinstance(feature, partial):
            if saved.tokenizer is None:
                raise FileNotFoundError(f"{origin}: {name} needs tokenizer.json, which is missing beside it")
            feature = feature(tokenizer=load_tokenizer(saved.tokenizer))
        features[name] = feature
    return features
