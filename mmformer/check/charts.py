"""A histogram, as SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmformer.report.html import Markup, tag
from mmformer.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, short, ticks

_BINS = 30


def histogram(values: Sequence[float | int], title: str, unit: str) -> Markup:
    """How many of the values lie in each of 30 equal steps; nothing for no values."""
    if not len(values):
        return Markup()
    array = np.asarray(values, dtype=np.float64)
    low, high = float(array.min()), float(array.max())
    counts, edges = np.histogram(array, _BINS, (low, high) if high > low else (low - 0.5, low + 0.5))
    marks = ticks(0.0, float(counts.max()), 4)

    def across(x: float) -> float:
        return round(LEFT + (x - edges[0]) / (edges[-1] - edges[0]) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(HEIGHT - BOTTOM - y / marks[-1] * (HEIGHT - TOP - BOTTOM), 1)

    grid = [
        [
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=down(y), y2=down(y), class_="grid"),
            tag("text", short(y), x=LEFT - 6, y=down(y) + 4, text_anchor="end"),
        ]
        for y in marks
    ]
    feet = [x for x in ticks(edges[0], edges[-1], 4) if edges[0] <= x <= edges[-1]]
    grid.append([tag("text", short(x), x=across(x), y=HEIGHT - 12, text_anchor="middle") for x in feet])
    grid.append([tag("text", unit, x=WIDTH - RIGHT, y=HEIGHT - 1, text_anchor="end")])
    bars = [
        tag(
            "rect",
            tag("title", f"{count:,.0f} from {short(left)} to {short(right)} {unit}"),
            x=across(left),
            y=down(count),
            width=max(1.0, round(across(right) - across(left) - 1, 1)),
            height=round(down(0.0) - down(count), 1),
            class_="bar s1",
        )
        for count, left, right in zip(
            counts.astype(float).tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True
        )
        if count
    ]
    drawing = tag("svg", grid, bars, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    said = f"median {short(float(np.median(array)))}, from {short(low)} to {short(high)} {unit}"
    return tag("figure", tag("figcaption", title), tag("p", said, class_="note"), drawing)
