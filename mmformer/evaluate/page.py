"""What an evaluation leaves: `evaluation.json`, and `evaluation.html` that asks nothing of a network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmformer.evaluate.judge import Curve, Evaluated
from mmformer.metrics.bootstrap import Interval
from mmformer.report.html import Markup, render, section, table, tag
from mmformer.report.svg import Series, bar, line_chart

JSON, PAGE = "evaluation.json", "evaluation.html"


def write(found: Evaluated, folder: Path) -> Path:
    """Write both files into a folder, and return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(found.plain()), indent=1, ensure_ascii=False, allow_nan=False)
    for name, content in ((JSON, text), (PAGE, build(found))):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(folder / name)
    return folder / PAGE


def build(found: Evaluated) -> Markup:
    """The page as a string."""
    title = f"Evaluation: {found.facts.get('task', found.headline)}"
    facts = [(tag("dt", name), tag("dd", str(value))) for name, value in found.facts.items()]
    style = Markup(files("mmformer.report").joinpath("style.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", style),
    )
    body = [
        tag("header", tag("h1", title), tag("dl", facts)),
        section("Metrics", _table({"": found.metrics}), note="Each with its 95\u2009% bootstrap interval."),
        section("By modalities", _bars(found), note="Of the samples that have all of them, with nothing else."),
        section(
            "Under noise", _charts(found), note="Steps from none (0) to the strongest; the table has the strengths."
        ),
        section("Under noise, in numbers", *(_strengths(found.headline, curve) for curve in found.curves)),
    ]
    return render([Markup("<!doctype html>\n"), tag("html", head, tag("body", tag("main", body)), lang="en")])


def shown(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _table(rows: Mapping[str, Mapping[str, Interval]]) -> Markup:
    lines = [
        [name, shown(i.value), f"{shown(i.low)} to {shown(i.high)}"] for row in rows.values() for name, i in row.items()
    ]
    return table(["", "value", "95\u2009% interval"], lines, (1, 2))


def _bars(found: Evaluated) -> Markup:
    """The headline of each subset; as bars where it is a share."""
    lines = []
    for letters, metrics in found.subsets.items():
        interval = metrics.get(found.headline)
        if interval is not None:
            share = 0 <= interval.low <= interval.high <= 1
            drawing = bar(interval.value, (interval.low, interval.high)) if share else None
            lines.append([letters, shown(interval.value), drawing])
    return tag("div", table(["", found.headline, ""], lines, (1,)), class_="bars") if lines else Markup()


def _charts(found: Evaluated) -> Markup:
    """A chart for each modality, a curve for each of its degradations."""
    charts = []
    for modality in dict.fromkeys(curve.modality for curve in found.curves):
        curves = [curve for curve in found.curves if curve.modality == modality]
        series = [_series(found.headline, curve, color) for color, curve in enumerate(curves, 1)]
        charts.append(line_chart(series, f"{found.headline}: {modality}"))
    return tag("div", charts, class_="charts") if charts else Markup()


def _series(headline: str, curve: Curve, color: int) -> Series:
    metrics = [curve.clean, *(point.metrics for point in curve.points)]
    values = [m[headline].value if headline in m else math.nan for m in metrics]
    return Series(curve.name, tuple(map(float, range(len(values)))), tuple(values), color)


def _strengths(headline: str, curve: Curve) -> Markup:
    lines: list[list[Any]] = [["none", *_cells(curve.clean.get(headline))]]
    lines += [[f"{point.strength:g}", *_cells(point.metrics.get(headline))] for point in curve.points]
    name = f"{curve.name} of {curve.modality}, {curve.strength}"
    return render([tag("h3", name), table([curve.strength, headline, "95\u2009% interval"], lines, (1, 2))])


def _cells(interval: Interval | None) -> list[str]:
    return (
        ["-", "-"] if interval is None else [shown(interval.value), f"{shown(interval.low)} to {shown(interval.high)}"]
    )


def finite(value: Any) -> Any:
    """As JSON can hold it: null in place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
