"""Gathering what a model predicts while a split is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmformer.batch import Batch
from mmformer.datasets.manifest import Manifest
from mmformer.objectives.objective import Objective
from mmformer.report.data import count_data, manifest_media, manifest_rows, training_majority
from mmformer.report.predictions import Answers, write_predictions
from mmformer.report.report import write_report
from mmformer.report.run import describe_run, read_faults


class Collector:
    """Keeps the predictions of the first objective that has a target, for each subset of the modalities.

    `update` takes what `Evaluation.judge` yields. The predictions are kept on the CPU.
    """

    def __init__(self, objectives: Mapping[str, Objective]):
        targets = {name: getattr(objective, "target", None) for name, objective in objectives.items()}
        self.objective, self.target = next(((n, t) for n, t in targets.items() if t is not None), (None, None))
        self._found: dict[str, list[tuple[tuple[str, ...], Tensor, Tensor, Tensor]]] = {}

    def update(self, objective: str, subset: str, prediction: Mapping[str, Tensor], batch: Batch) -> None:
        """Keep one batch; predictions of other objectives are passed over."""
        if objective != self.objective or self.target not in batch.targets:
            return
        outputs = prediction["logits" if "logits" in prediction else "value"]
        kept = (outputs.float().cpu(), batch.targets[self.target].cpu(), prediction["present"].cpu())
        self._found.setdefault(subset, []).append((batch.ids, *kept))

    def answers(self) -> dict[str, Answers]:
        """What `write_predictions` takes; empty when no objective has a target."""
        return {subset: _join(parts) for subset, parts in self._found.items()}


def _join(parts: list[tuple[tuple[str, ...], Tensor, Tensor, Tensor]]) -> Answers:
    ids, outputs, targets, present = zip(*parts, strict=True)
    names = tuple(name for part in ids for name in part)
    # Processes pad their shares with repeated samples: the first counts.
    first = np.unique(np.array(names), return_index=True)[1]
    first.sort()

    def rows(tensors: tuple[Tensor, ...]) -> np.ndarray:
        return torch.cat(tensors).numpy()[first]

    return Answers(
        ids=tuple(names[i] for i in first), outputs=rows(outputs), targets=rows(targets), present=rows(present)
    )


def report_test(folder: Path, collector: Collector, manifest: Manifest, names: Sequence[str], **facts: Any) -> Path:
    """Write what a run leaves for people, after its test and its `metrics.json`: the path of `report.html`.

    Writes `predictions.parquet` and `run.json` too. `names` are the labels of the collected target, `facts` plain
    values for the header, as `describe_run` takes them (`seconds`, `parameters`, `device`).
    """
    answers = collector.answers()
    if answers:
        ids = answers[""].ids
        write_predictions(folder, answers, names, manifest_rows(manifest, ids), _faults(folder))
    known = {"majority": training_majority(manifest)} if collector.target == "label" else {}
    describe_run(folder, data=count_data(manifest), **known, **facts)
    return write_report(folder, manifest_media(manifest))


def _faults(folder: Path) -> dict[str, str]:
    """What of each row could not be read, from `data_errors.jsonl`."""
    return {str(f["id"]): f"{f['column']} {f['path']}: {f['reason']}" for f in read_faults(folder)}
