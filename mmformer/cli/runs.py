"""`mmformer runs`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

MOST_COLUMNS = 6


def runs(
    folder: Annotated[Path, typer.Argument(help="Where runs lie.")] = Path("runs"),
    sort: Annotated[
        str | None, typer.Option(help="A metric to sort by, such as test/acc; the best comes first.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", "-m", help="Show this metric; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every metric.")] = False,
) -> None:
    """List runs with their metrics, the newest first."""
    from mmformer.report.run import find_runs, read_metrics

    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: train first (python train.py), or say where the runs lie")
    found = [(path, read_metrics(path)) for path in find_runs(folder)]
    if not found:
        raise FileNotFoundError(f"no run in {folder}: train first (python train.py), or say where the runs lie")
    known = list(dict.fromkeys(name for _, metrics in found for name in metrics))
    for name in [*(metric or []), *([sort] if sort else [])]:
        if name not in known:
            raise ValueError(f"no run has the metric {name!r}; they have {', '.join(known) or 'none yet'}")
    if sort:
        found.sort(key=lambda run: _rank(run[1].get(sort), sort))
    if as_json:
        import json

        typer.echo(json.dumps([{"run": str(path), "metrics": metrics} for path, metrics in found], indent=2))
        return
    _show(found, metric or _chosen(known, sort))


def _rank(value: float | None, name: str) -> tuple[bool, float]:
    """Runs without the metric last; the smallest first where small is good."""
    if value is None or value != value:
        return (True, 0.0)
    small_is_good = any(part in name for part in ("loss", "mae", "rmse", "median_rank", "wer", "cer", "perplexity"))
    return (False, value if small_is_good else -value)


def _chosen(known: list[str], sort: str | None) -> list[str]:
    """The metrics of whole splits, those of the test first; without those of subsets of the modalities."""
    whole = [name for name in known if name.startswith(("val/", "test/")) and name.rpartition("_")[0] not in known]
    whole.sort(key=lambda name: (name.startswith("val/"), "loss" in name))
    first = [sort] if sort else []
    return [*first, *(name for name in whole if name not in first)][:MOST_COLUMNS]


def _show(found: list[tuple[Path, dict[str, float]]], names: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("written", no_wrap=True)
    for path, metrics in found:
        written = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        cells = [f"{metrics[name]:.4g}" if name in metrics else "-" for name in names]
        table.add_row(Text(str(path)), *cells, written if metrics else f"{written} (unfinished)")
    console = Console()
    # A pipe has no width: a run's name must not be cut there.
    (console if console.is_terminal else Console(width=240)).print(table)
