"""The few charts a report needs, as SVG that takes its colours from the page's style sheet.

No chart holds a colour: series i has the class `s1` to `s6`, everything else takes the page's inks, so one drawing
serves the light and the dark theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, isfinite, log10

from mmformer.report.html import Markup, render, tag

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 30
MAX_POINTS = 400
LARGEST = 1e290
"""Beyond this, differences of two values may overflow; a run that came so far has diverged anyway."""


@dataclass(frozen=True)
class Series:
    """A named curve; `x` is in rising order. `color` is 1 to 6, so that a name keeps its colour between charts."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: int = 1


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** floor(log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    return [float(f"{i * step:.12g}") for i in range(floor(low / step), ceil(high / step - 1e-9) + 1)]


def short(value: float) -> str:
    """A number as an axis shows it: 12000 -> 12k, 0.0005 -> 5e-4."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def thin(series: Series, limit: int = MAX_POINTS) -> Series:
    """At most `limit` points: each the mean of a run of neighbours, the last kept as it is."""
    count = len(series.x)
    if count <= limit:
        return series
    size = ceil(count / limit)
    starts = range(0, count, size)
    x = [sum(part) / len(part) for part in (series.x[i : i + size] for i in starts)]
    y = [sum(part) / len(part) for part in (series.y[i : i + size] for i in starts)]
    return replace(series, x=(*x[:-1], series.x[-1]), y=(*y[:-1], series.y[-1]))


def line_chart(curves: Sequence[Series], title: str, x_label: str = "step") -> Markup:
    """Curves over a common x; points that are not finite are left out. Nothing when no curve has a point."""
    kept = [thin(finite(curve)) for curve in curves]
    kept = [curve for curve in kept if curve.x]
    if not kept:
        return Markup()
    xs, ys = [x for c in kept for x in c.x], [y for c in kept for y in c.y]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    low, high, size = min(ys), max(ys), max(abs(y) for y in ys)
    flat = high - low <= 1e-9 * size or high - low < 1 / LARGEST
    marks = ticks(low - max(size, 1) / 2, high + max(size, 1) / 2) if flat else ticks(low, high)
    y_low, y_high = marks[0], marks[-1]

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    grid = [
        [
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=down(y), y2=down(y), class_="grid"),
            tag("text", short(y), x=LEFT - 6, y=down(y) + 4, text_anchor="end"),
        ]
        for y in marks
    ]
    feet = [x for x in ticks(x_low, x_high, 4) if x_low <= x <= x_high]
    grid.append([tag("text", short(x), x=across(x), y=HEIGHT - 12, text_anchor="middle") for x in feet])
    grid.append([tag("text", x_label, x=WIDTH - RIGHT, y=HEIGHT - 1, text_anchor="end")])
    lines = [
        [
            _curve([(across(x), down(y)) for x, y in zip(c.x, c.y, strict=True)], f"s{c.color}"),
            tag("circle", cx=across(c.x[-1]), cy=down(c.y[-1]), r=3.5, class_=f"dot s{c.color}"),
        ]
        for c in kept
    ]
    legend = [tag("li", tag("i", class_=f"key s{c.color}"), f"{c.name} ", tag("b", short(c.y[-1]))) for c in kept]
    drawing = tag("svg", grid, lines, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", title), tag("ul", legend, class_="legend"), drawing)


def finite(curve: Series) -> Series:
    """The points that a chart can show."""
    pairs = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if isfinite(x) and abs(y) < LARGEST]
    return replace(curve, x=tuple(x for x, _ in pairs), y=tuple(y for _, y in pairs))


def _curve(points: Sequence[tuple[float, float]], style: str) -> Markup:
    if len(points) == 1:
        return Markup()
    return tag("polyline", points=" ".join(f"{x:g},{y:g}" for x, y in points), class_=f"curve {style}")


def bar(
    value: float, interval: tuple[float, float] | None = None, mark: float | None = None, style: str = "s1"
) -> Markup:
    """One horizontal bar that fills its cell; every number is a share of the full width, from 0 to 1.

    `interval` is drawn as a whisker, `mark` (chance, a baseline) as an upright line.
    """

    def percent(share: float) -> str:
        return f"{min(max(share, 0.0), 1.0) * 100:.2f}%"

    parts = [
        tag("rect", x=0, y=4, width="100%", height=12, rx=2, class_="track"),
        tag("rect", x=0, y=4, width=percent(value), height=12, rx=2, class_=f"bar {style}"),
    ]
    if interval is not None:
        low, high = percent(interval[0]), percent(interval[1])
        parts.append(tag("line", x1=low, x2=high, y1=10, y2=10, class_="whisker"))
        parts += [tag("line", x1=x, x2=x, y1=6, y2=14, class_="whisker") for x in (low, high)]
    if mark is not None:
        parts.append(tag("line", x1=percent(mark), x2=percent(mark), y1=1, y2=19, class_="mark"))
    return tag("svg", render(parts), class_="hbar", height=20, role="presentation")
