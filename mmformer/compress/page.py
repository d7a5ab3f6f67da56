"""The page of a recipe: accuracy against size and time, and by subset of the modalities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from mmformer.compress.measure import Measured
from mmformer.report.html import Markup, render, section, table, tag
from mmformer.report.svg import Series, line_chart


def write_page(path: Path, measured: Sequence[Measured], winner: str) -> Path:
    """Write the page, in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(build(measured, winner), encoding="utf-8")
    temporary.replace(path)
    return path


def build(measured: Sequence[Measured], winner: str) -> Markup:
    """The page as a string."""
    title = "Compression"
    style = Markup(files("mmformer.report").joinpath("style.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", style),
    )
    metric = measured[0].metric
    charts = [
        _points(measured, f"{metric} and size", "MB on disk", lambda one: one.size / 1e6),
        _points(measured, f"{metric} and time", "ms for one sample", lambda one: one.times[1].p50),
    ]
    body = [
        tag("header", tag("h1", title), tag("dl", tag("dt", "best"), tag("dd", winner))),
        section("What it costs and what it gains", *charts, note="Processor time on one thread, at the median."),
        section("Cost", _costs(measured)),
        section(
            f"By modalities: {metric}", _accuracies(measured), note="Of samples that have all of them, and no more."
        ),
    ]
    return render([Markup("<!doctype html>\n"), tag("html", head, tag("body", tag("main", body)), lang="en")])


def _points(measured: Sequence[Measured], title: str, label: str, x: Callable[[Measured], float]) -> Markup:
    series = [Series(one.name, (x(one),), (one.accuracy[""],), i % 6 + 1) for i, one in enumerate(measured)]
    return line_chart(series, title, label)


def _costs(measured: Sequence[Measured]) -> Markup:
    header = [
        "",
        "MB",
        "M parameters",
        "M operations",
        "ms at 1 (p95)",
        "ms at 8 (p95)",
        "rows/s",
        "peak MB",
        "difference",
    ]
    rows = []
    for one in measured:
        single, eight = one.times[1], one.times[8]
        rows.append([
            one.name,
            f"{one.size / 1e6:.2f}",
            _number(one.parameters, 1e6),
            _number(one.operations, 1e6),
            f"{single.p50:.2f} ({single.p95:.2f})",
            f"{eight.p50:.2f} ({eight.p95:.2f})",
            f"{eight.throughput:.0f}",
            _number(one.memory, 1e6),
            "-" if one.difference is None else f"{one.difference:.1e}",
        ])  # fmt: skip
    return table(header, rows, range(1, len(header)))


def _accuracies(measured: Sequence[Measured]) -> Markup:
    subsets = list(measured[0].accuracy)
    rows = [[one.name, *(f"{one.accuracy.get(letters, float('nan')):.4f}" for letters in subsets)] for one in measured]
    return table(["", *(letters or "as they are" for letters in subsets)], rows, range(1, len(subsets) + 1))


def _number(value: int | float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.2f}"
