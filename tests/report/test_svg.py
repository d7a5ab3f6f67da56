from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmformer.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, bar, line_chart, short, thin, ticks

FINITE = st.floats(-1e12, 1e12)


@given(FINITE, st.floats(1e-9, 1e12))
def test_ticks_cover_the_range_with_few_round_numbers(low, width):
    high = low + width
    if not high > low:
        return
    marks = ticks(low, high)
    slack = 1e-9 * max(abs(low), abs(high))
    assert marks[0] <= low + slack
    assert marks[-1] >= high - 1e-6 * width - slack
    assert len(marks) <= 9
    assert marks == sorted(marks)


def points(chart: str) -> list[tuple[float, float]]:
    found = re.findall(r'points="([^"]*)"', chart)
    return [tuple(map(float, pair.split(","))) for line in found for pair in line.split()]


@given(st.lists(st.floats(), min_size=2, max_size=30))
def test_a_chart_stays_inside_its_frame_whatever_the_values(values):
    chart = line_chart([Series("loss", tuple(map(float, range(len(values)))), tuple(values))], "loss")
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        assert chart == ""
        return
    ElementTree.fromstring(chart)
    for x, y in points(chart):
        assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


def test_a_higher_value_is_drawn_higher():
    chart = line_chart([Series("acc", (0.0, 1.0, 2.0), (0.1, 0.9, 0.5), 2)], "accuracy")
    heights = [y for _, y in points(chart)]
    assert heights[1] < heights[2] < heights[0]
    assert 'class="curve s2"' in chart


def test_thinning_keeps_the_end_and_the_mean():
    curve = Series("a", tuple(map(float, range(10_001))), tuple(float(i % 7) for i in range(10_001)))
    fewer = thin(curve, 100)
    assert len(fewer.x) <= 100
    assert (fewer.x[-1], fewer.y[-1]) == (curve.x[-1], curve.y[-1])
    assert sum(fewer.y) / len(fewer.y) == pytest.approx(3, abs=0.1)
    assert thin(fewer, 100) is fewer


def test_a_bar_is_as_long_as_its_share_and_never_longer_than_its_cell():
    drawn = ElementTree.fromstring(bar(0.25, (0.2, 1.4), mark=0.1))
    widths = [part.get("width") for part in drawn.iter("rect")]
    assert widths == ["100%", "25.00%"]
    whisker = next(part for part in drawn.iter("line"))
    assert (whisker.get("x1"), whisker.get("x2")) == ("20.00%", "100.00%")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (0.25, "0.25"), (12000.0, "12k"), (2.5e6, "2.5M"), (0.0005, "5e-4"), (-0.5, "-0.5")],
)
def test_axis_numbers_are_short(value, shown):
    assert short(value) == shown
