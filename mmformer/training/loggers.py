"""Trackers: a CSV file that survives a kill, and Weights & Biases that never asks and never fails a run."""

from __future__ import annotations

import csv
import netrc
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers import Logger

CLOCKED = "speed/"
"""What the names of metrics begin with that depend on the clock."""


class MetricsCSV(Logger):
    """Metrics as rows (`step, epoch, ...`) of one CSV file; a column that comes later is added to the header.

    `rows` is stored in each checkpoint, and a resumed run goes on after that row: the file is that of a run that was
    never stopped, byte for byte. So what depends on the clock is left out; the other trackers have it.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []
        self._rows = 0
        if self.path.is_file():
            self.rewind(None)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def rows(self) -> int:
        return self._rows

    def rewind(self, rows: int | None) -> None:
        """Keep the first `rows` rows of the file; None keeps all."""
        kept = self._read()[:rows]
        self._columns = list(dict.fromkeys(name for row in kept for name in row))
        self._rows = len(kept)
        self._write(kept)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return [{k: v for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]

    def _write(self, rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".csv.tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        kept = {name: value for name, value in metrics.items() if not name.startswith(CLOCKED)}
        if not kept.keys() - {"epoch"}:
            return
        row: dict[str, Any] = {"step": int(step or 0)} | kept
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._write(self._read())
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        self._rows += 1

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder holds `config.yaml` already."""


def offline_reason(base_url: str = "https://api.wandb.ai", timeout: float = 3.0) -> str | None:
    """Why Weights & Biases cannot be reached from here; None if it can. Never prompts, never reads the key itself."""
    url = urlparse(os.environ.get("WANDB_BASE_URL", base_url))
    host = url.hostname or ""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(host):
        return "there is no API key (`wandb login`, or WANDB_API_KEY)"
    try:
        socket.create_connection((host, url.port or 443), timeout).close()
    except OSError as error:
        return f"{host} cannot be reached ({error})"
    return None


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return path.is_file() and netrc.netrc(str(path)).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def wandb_logger(*, offline: bool, **options: Any) -> Logger:
    """A Weights & Biases logger that goes offline, with one warning, where there is no key or no network."""
    from pytorch_lightning.loggers import WandbLogger

    reason = None if offline else offline_reason()
    if reason is not None:
        print(f"wandb: offline, because {reason}; send it later with `wandb sync`", file=sys.stderr)
    os.environ.setdefault("WANDB_SILENT", "true")
    return WandbLogger(offline=offline or reason is not None, resume="allow", **options)
