"""`mmformer bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmformer.compress.measure import Measured


def bench(
    what: Annotated[list[Path], typer.Argument(help="Runs, and files of `mmformer export`; a run first.")],
    data: Annotated[
        Path | None, typer.Option(help="A manifest to judge on; by default that which the first run was trained on.")
    ] = None,
    split: Annotated[str, typer.Option(help="The rows to judge on; `all` for all of them.")] = "test",
    rows: Annotated[int, typer.Option(min=1, help="Most rows to judge on.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 60,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file for the figures, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure size, time and accuracy of runs and exported files side by side, on one thread."""
    import json

    from mmformer.compress.measure import data_of, first_run, measure, rows_to_judge
    from mmformer.compress.opened import open_any

    subjects = [open_any(path) for path in what]
    predictor = first_run(subjects)
    if predictor is None:
        raise ValueError("name a run too: it knows how to read the rows that are judged on")
    manifest = data or data_of(next(path for path in what if path.is_dir()))
    chosen = rows_to_judge(predictor, manifest, None if split == "all" else split, rows)
    found = measure(subjects, chosen, rounds)
    text = json.dumps([one.plain() for one in found], indent=1)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    typer.echo(text if as_json else table(found))


def table(found: list[Measured]) -> str:
    """The figures in columns, times and sizes beside how often they are those of the first."""
    subsets = [letters for letters in found[0].accuracy if letters]
    header = ["", "MB", "M params", "M ops", "ms at 1", "p95", "ms at 8", "p95", "rows/s", "peak MB", "difference"]
    lines = [[*header, found[0].metric, *subsets]]
    for one in found:
        single, eight = one.times[1], one.times[8]
        cells = [
            Path(one.name).name if one is not found[0] else one.name,
            f"{one.size / 1e6:.2f} ({_times(found[0].size, one.size)})",
            _number(one.parameters, 1e6),
            _number(one.operations, 1e6),
            f"{single.p50:.2f} ({_times(found[0].times[1].p50, single.p50)})",
            f"{single.p95:.2f}",
            f"{eight.p50:.2f} ({_times(found[0].times[8].p50, eight.p50)})",
            f"{eight.p95:.2f}",
            f"{eight.throughput:.0f}",
            _number(one.memory, 1e6, 0),
            "-" if one.difference is None else f"{one.difference:.1e}",
            *(f"{one.accuracy.get(letters, float('nan')):.4f}" for letters in ("", *subsets)),
        ]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _times(first: int | float, other: int | float) -> str:
    return f"{first / other:.1f}x"


def _number(value: int | float | None, unit: float, digits: int = 2) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"
