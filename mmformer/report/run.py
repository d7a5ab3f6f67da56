"""A run folder, read: what was asked, what was measured, what went wrong with the data."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mmformer.report.predictions import Predictions, read_predictions, read_retrieval
from mmformer.report.retrieval import Retrieval
from mmformer.report.svg import Series

ABOUT = "run.json"
PACKAGES = ("mmformer", "torch", "pytorch-lightning", "hydra-core", "torchvision", "torchaudio", "numpy")
MARKS = ("metrics.json", "metrics.csv", "config.yaml", ABOUT)
"""A folder that holds one of these files is a run."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder says; whatever file is absent is empty here.

    `metrics` are the final numbers by name (`test/acc`), `curves` the whole history by name, over steps. `about` is
    `run.json`, `faults` the lines of `data_errors.jsonl`.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Series] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    faults: tuple[dict[str, Any], ...] = ()
    predictions: Predictions | None = None
    retrieval: Retrieval | None = None

    @property
    def name(self) -> str:
        return str(self.config.get("task_name") or self.folder.parent.name)


def describe_run(
    run: Path,
    started: datetime,
    command: Sequence[str] | None = None,
    data: Mapping[str, Mapping[str, int]] | None = None,
    **facts: Any,
) -> Path:
    """Write `run.json`: when it started, the command, the versions, and what else the report's header shows.

    `command` is that of this process where None. `data[split][combination]` counts samples by what they have
    (`"audio+image"`). `facts` are plain values: `seconds`, `parameters`, `device`, `resumed` (it went on from a
    checkpoint), `majority` (the most frequent training label), ...
    """
    about = {
        "command": shlex.join(_own_command() if command is None else command),
        "started": started.astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "data": {split: dict(counts) for split, counts in (data or {}).items()},
    } | facts
    run.mkdir(parents=True, exist_ok=True)
    temporary = run / f".{ABOUT}.tmp"
    temporary.write_text(json.dumps(about, indent=2, ensure_ascii=False))
    return temporary.replace(run / ABOUT)


def _own_command() -> list[str]:
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return ["python", program, *sys.argv[1:]] if program.endswith(".py") else [program, *sys.argv[1:]]


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that was not installed
            continue
    return found


def is_run(folder: Path) -> bool:
    """Whether a folder holds any of the files that a run leaves."""
    return any((folder / mark).is_file() for mark in MARKS)


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: the folder does not exist, or holds nothing of a run.
        ValueError: a file of it is damaged; the message names it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give the folder of a run (`mmformer runs` lists them)")
    if not is_run(folder):
        raise FileNotFoundError(
            f"{folder} is not a run: it holds none of {', '.join(MARKS)} (`mmformer runs` lists the runs)"
        )
    return Run(
        folder=folder,
        config=_mapping(folder / "config.yaml"),
        metrics=read_metrics(folder),
        curves=read_curves(folder),
        about=_mapping(folder / ABOUT),
        faults=read_faults(folder),
        predictions=read_predictions(folder),
        retrieval=read_retrieval(folder),
    )


def read_metrics(folder: Path) -> dict[str, float]:
    """The final numbers of a run: every number of `metrics.json`, nested names joined by `/`."""
    return dict(_numbers(_mapping(folder / "metrics.json")))


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            out += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out.append((prefix + name, float(value)))
    return out


def _mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        loaded = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_LOADER)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a mapping of names to values")
    return loaded or {}


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_faults(folder: Path) -> tuple[dict[str, Any], ...]:
    """What of the data could not be read, a dict a cell: `id`, `column`, `path`, `reason`."""
    path = folder / "data_errors.jsonl"
    if not path.exists():
        return ()
    try:
        return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_curves(folder: Path) -> dict[str, Series]:
    """Every column of `metrics.csv` (as Lightning's CSVLogger writes it) that ever holds a number, over `step`."""
    path = folder / "metrics.csv"
    if not path.exists():
        return {}
    points: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            given = _number(row.get("step"))
            step = float(number) if given is None else given
            for name in filter(lambda name: name not in ("step", None), row):
                if (value := _number(row[name])) is not None:
                    points.setdefault(name, []).append((step, value))
    curves = {}
    for name, pairs in points.items():
        unique = dict(sorted(pairs, key=lambda pair: pair[0]))  # a resumed run repeats steps: the last counts
        curves[name] = Series(name, tuple(unique), tuple(unique.values()))
    return curves


def _number(cell: str | list[str] | None) -> float | None:
    try:
        value = float(cell)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def find_runs(root: Path) -> list[Path]:
    """Run folders under `root` (itself one of them, perhaps), newest first."""
    if is_run(root):
        return [root]
    found = [path for path in _folders(root, depth=4) if is_run(path)]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _folders(root: Path, depth: int) -> list[Path]:
    if depth == 0 or not root.is_dir():
        return []
    out: list[Path] = []
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            # What lies inside a run (its model, its trackers' folders) is no run of its own.
            out += [path] if is_run(path) else [path, *_folders(path, depth - 1)]
    return out
