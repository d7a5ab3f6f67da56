"""Every row that could not be read, once, in the run folder; and an end to a run that reads too few."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from mmformer.batch import Batch

_ALWAYS_ALLOWED = 10
"""Bad rows that never stop a run: a share of a small set says little."""


class BadDataError(RuntimeError):
    """More rows are unreadable than the run allows."""


class DataErrors(Callback):
    """Write each fault to a JSON line (id, column, path, reason), and stop above `max_bad_fraction` of all rows.

    A few rows (10) never stop a run, unless they are all there is.
    """

    def __init__(self, path: str, max_bad_fraction: float) -> None:
        self.path = Path(path)
        self.max_bad_fraction = max_bad_fraction
        self._seen: set[tuple[str, str, str]] = set()
        self.bad_rows: set[str] = set()
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                self._know(json.loads(line))

    def _know(self, fault: dict[str, str]) -> bool:
        key = (fault["id"], fault["column"], fault["path"])
        if key in self._seen:
            return False
        self._seen.add(key)
        self.bad_rows.add(fault["id"])
        return True

    def _look(self, trainer: pl.Trainer, batch: Batch) -> None:
        new = [asdict(fault) for fault in batch.faults]
        new = [fault for fault in new if self._know(fault)]
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(fault, ensure_ascii=False) + "\n" for fault in new)
        rows = trainer.datamodule.num_rows  # pyright: ignore[reportAttributeAccessIssue]
        allowed = max(self.max_bad_fraction * rows, min(_ALWAYS_ALLOWED, rows - 1))
        if len(self.bad_rows) > allowed:
            first = new[0]
            raise BadDataError(
                f"{len(self.bad_rows)} of {rows} rows could not be read, more than data.max_bad_fraction="
                f"{self.max_bad_fraction} allows; the latest is row {first['id']}, {first['column']} {first['path']}:"
                f" {first['reason']}; all are listed in {self.path}: mend them or raise data.max_bad_fraction"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._look(trainer, batch)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._look(trainer, batch)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._look(trainer, batch)
