"""Gathering what a model predicts while a split is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmformer.batch import Batch
from mmformer.datasets.manifest import Manifest
from mmformer.objectives.contrastive import RetrievalMeter, retrieval_ranks
from mmformer.objectives.objective import Objective, letters
from mmformer.report.data import count_data, manifest_media, manifest_rows, training_majority
from mmformer.report.predictions import Answers, Texts, write_predictions
from mmformer.report.report import write_report
from mmformer.report.retrieval import SHOWN, Retrieved
from mmformer.report.run import describe_run, read_faults


class Collector:
    """Keeps the predictions of the first objective that has a target, for each subset of the modalities.

    Where none has one, those of the first that writes texts; and the embeddings of the first objective that is judged
    by retrieval. `update` takes what `Evaluation.judge` yields. All is kept on the CPU.
    """

    def __init__(self, objectives: Mapping[str, Objective]):
        targets = {name: getattr(objective, "target", None) for name, objective in objectives.items()}
        self.objective, self.target = next(((n, t) for n, t in targets.items() if t is not None), (None, None))
        self._found: dict[str, list[tuple[tuple[str, ...], Tensor, Tensor, Tensor]]] = {}
        meters = {name: objective.meter() for name, objective in objectives.items()}
        judged = ((name, meter) for name, meter in meters.items() if isinstance(meter, RetrievalMeter))
        self._retrieval, self._meter = next(judged, (None, None))
        self._embedded: list[str] = []
        self._writes: str | None = None
        self._texts: dict[str, dict[str, list[tuple[list[int], list[int]]]]] = {}

    def update(self, objective: str, subset: str, prediction: Mapping[str, Tensor], batch: Batch) -> None:
        """Keep one batch; predictions of other objectives are passed over."""
        if self._meter is not None and objective == self._retrieval and not subset:
            self._meter.update(dict(prediction), batch)
            self._embedded += batch.ids
        if self.objective is None and {"ids", "wanted"} <= prediction.keys() and self._writes in (None, objective):
            self._writes = objective
            for id, turns in zip(batch.ids, _turns(prediction), strict=True):
                self._texts.setdefault(subset, {}).setdefault(id, turns)  # processes pad with repeated samples
        if objective != self.objective or self.target not in batch.targets:
            return
        outputs = prediction["logits" if "logits" in prediction else "value"]
        kept = (outputs.float().cpu(), batch.targets[self.target].cpu(), prediction["present"].cpu())
        self._found.setdefault(subset, []).append((batch.ids, *kept))

    def answers(self) -> dict[str, Answers]:
        """What `write_predictions` takes; empty when no objective has a target."""
        return {subset: _join(parts) for subset, parts in self._found.items()}

    def texts(self, decode: Callable[[Sequence[int]], str]) -> dict[str, Texts]:
        """What was written, for `write_predictions`; empty when no objective writes."""
        out = {}
        for subset, found in self._texts.items():
            said = {id: [(decode(one), decode(other)) for one, other in turns] for id, turns in found.items() if turns}
            if not said:
                continue
            out[subset] = Texts(
                ids=tuple(said),
                written=tuple([one for one, _ in turns] for turns in said.values()),
                wanted=tuple([other for _, other in turns] for turns in said.values()),
            )
        return out

    def retrieved(self) -> dict[str, Retrieved]:
        """What was retrieved in each direction (`t2i`); empty when no objective is judged by retrieval."""
        if self._meter is None or not self._embedded:
            return {}
        first = _first(self._embedded)
        found = {name: rows[first] for name, rows in self._meter.embeddings().items()}
        ids, letter = np.array(self._embedded)[first], letters(self._meter.modalities)
        out = {}
        for one, other in permutations(filter(found.__contains__, letter), 2):
            both = ~(found[one].isnan().any(1) | found[other].isnan().any(1))
            if both.any():
                kept = tuple(ids[both.numpy()].tolist())
                direction = f"{letter[one]}2{letter[other]}"
                out[direction] = _retrieve((one, other), kept, found[one][both], found[other][both])
        return out


def _turns(prediction: Mapping[str, Tensor]) -> list[list[tuple[list[int], list[int]]]]:
    """For each sample the ids that were written and those that are wanted, of each of its turns that has both.

    What has no turns, as of `CTC`, has one, and a wanted text that begins with -2 is lacking.
    """
    rows = (prediction["ids"].tolist(), prediction["wanted"].tolist())
    if prediction["ids"].ndim == 2:
        rows = tuple([[ids] for ids in side] for side in rows)
    present = prediction["present"].tolist() if "present" in prediction else [[w[:1] != [-2]] for (w,) in rows[1]]
    return [
        [([i for i in one if i >= 0], [i for i in other if i >= 0])
         for one, other, there in zip(*sample, strict=True) if there]
        for sample in zip(*rows, present, strict=True)
    ]  # fmt: skip


def _join(parts: list[tuple[tuple[str, ...], Tensor, Tensor, Tensor]]) -> Answers:
    ids, outputs, targets, present = zip(*parts, strict=True)
    names = tuple(name for part in ids for name in part)
    first = _first(names)

    def rows(tensors: tuple[Tensor, ...]) -> np.ndarray:
        return torch.cat(tensors).numpy()[first]

    return Answers(
        ids=tuple(names[i] for i in first), outputs=rows(outputs), targets=rows(targets), present=rows(present)
    )


def _first(names: Sequence[str]) -> np.ndarray:
    """Where each name stands first: processes pad their shares with repeated samples."""
    return np.sort(np.unique(np.array(names), return_index=True)[1])


def _retrieve(modalities: tuple[str, str], ids: tuple[str, ...], queries: Tensor, keys: Tensor) -> Retrieved:
    found = [(part @ keys.T).topk(min(SHOWN, len(keys))) for part in queries.split(1024)]
    return Retrieved(
        query=modalities[0],
        key=modalities[1],
        ids=ids,
        ranks=retrieval_ranks(queries, keys).numpy(),
        best=torch.cat([part.indices for part in found]).numpy(),
        scores=torch.cat([part.values for part in found]).numpy(),
    )


def report_test(
    folder: Path,
    collector: Collector,
    manifest: Manifest,
    names: Sequence[str],
    started: datetime,
    decode: Callable[[Sequence[int]], str] | None = None,
    **facts: Any,
) -> Path:
    """Write what a run leaves for people, after its test and its `metrics.json`: the path of `report.html`.

    Writes `predictions.parquet` and `run.json` too. `names` are the labels of the collected target, `decode` makes
    texts of ids, `facts` are plain values for the header, as `describe_run` takes them (`seconds`, `parameters`).
    """
    answers = collector.answers() or (collector.texts(decode) if decode is not None else {})
    retrieved = collector.retrieved()
    if answers or retrieved:
        ids = dict.fromkeys(id for part in (*answers.values(), *retrieved.values()) for id in part.ids)
        rows = manifest_rows(manifest, ids)
        write_predictions(folder, answers, names, rows, _faults(folder), retrieved=retrieved)
    known = {"majority": training_majority(manifest)} if collector.target == "label" else {}
    describe_run(folder, started, data=count_data(manifest), **known, **facts)
    return write_report(folder, manifest_media(manifest))


def _faults(folder: Path) -> dict[str, str]:
    """What of each row could not be read, from `data_errors.jsonl`."""
    return {str(f["id"]): f"{f['column']} {f['path']}: {f['reason']}" for f in read_faults(folder)}
