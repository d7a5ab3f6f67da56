"""The sections of a report about retrieval: how often it succeeds in each direction, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmformer.metrics.bootstrap import percentile_interval
from mmformer.report.html import Markup, section, table, tag
from mmformer.report.results import percent
from mmformer.report.retrieval import Retrieval, chance
from mmformer.report.run import Run
from mmformer.report.show import MEDIA_BYTES, Budget, Media, show
from mmformer.report.svg import bar

CUTS = (1, 5, 10)
QUERIES = 24
"""Queries of the gallery, over all directions."""
SIDE = 96
CLIP = 3


def recalls(run: Run) -> Markup:
    """Recall at 1, 5 and 10 and the median rank of each direction, beside chance."""
    if run.retrieval is None:
        return Markup()
    rows, sizes = [], {}
    for direction, (query, key) in run.retrieval.directions.items():
        ranks = run.retrieval.ranks(direction)
        ranks = ranks[~np.isnan(ranks)]
        sizes[len(ranks)] = None
        first = percentile_interval(ranks <= 1)
        shares = [percent(float((ranks <= cut).mean())) for cut in CUTS]
        drawing = bar(first.value, (first.low, first.high), chance(len(ranks), 1))
        rows.append([f"{query} \u2192 {key}", f"{len(ranks):,}", *shares, f"{np.median(ranks):,.4g}", drawing])
    for size in sizes:
        shares = [percent(chance(size, cut)) for cut in CUTS]
        rows.append([tag("i", "by chance"), f"{size:,}", *shares, f"{(size + 1) / 2:,.6g}", ""])
    header = ["", "among", *(f"R@{cut}" for cut in CUTS), "median rank", "R@1 with its 95\u2009% interval"]
    note = (
        "R@k is the share of queries that find their own sample among the first k. Of samples that score the same as"
        " it, half count as found before it."
    )
    return section("Retrieval", tag("div", table(header, rows, range(1, 6)), class_="bars"), note=note)


def gallery(run: Run, media: Media) -> Markup:
    """Queries of each direction with the samples that came first: some that were right, some that were wrong."""
    if run.retrieval is None:
        return Markup()
    directions = run.retrieval.directions
    half = max(1, QUERIES // len(directions) // 2)
    parts = []
    for number, (direction, (query, key)) in enumerate(directions.items()):
        budget = Budget(MEDIA_BYTES // len(directions))
        found = run.retrieval.rows(_drawn(run.retrieval.ranks(direction), half, seed=number))
        lines = [_line(row, direction, run.retrieval, media, budget) for row in found]
        parts.append([tag("h3", f"{query} \u2192 {key}"), tag("div", lines, class_="gallery")])
    note = (
        "Queries of the test drawn at random, as many right as wrong ones where there are as many, with what came"
        " first; a frame marks the query's own sample, which stands at the end where it is not among the first."
    )
    return section("What was found", parts, note=note)


def _drawn(ranks: np.ndarray, half: int, seed: int) -> list[int]:
    """Places of random queries: up to `half` of rank 1 and as many others, or more where the first are few."""
    random = np.random.default_rng(seed)
    right, wrong = (random.permutation(np.flatnonzero(those)) for those in (ranks <= 1, ranks > 1))
    few, many = min(half, len(right)), min(half, len(wrong))
    return [*right[: 2 * half - many].tolist(), *wrong[: 2 * half - few].tolist()]


def _line(row: Mapping[str, Any], direction: str, found: Retrieval, media: Media, budget: Budget) -> Markup:
    """A query, what came first, and its own sample where that is not among it."""
    query, key = found.directions[direction]
    best = [hit["id"] for hit in row[f"found_{direction}"]]
    shown = best if row["id"] in best else [*best, row["id"]]
    rows = {hit["id"]: hit for hit in found.rows([found.place[id] for id in shown])}
    scores = {hit["id"]: f"{hit['score']:.2f}" for hit in row[f"found_{direction}"]}
    rank = f"rank {row[f'rank_{direction}']:,.6g}"
    items = [
        tag(
            "div",
            _item(rows[id], key, media, budget),
            tag("small", rank if id == row["id"] else scores[id]),
            class_="item own" if id == row["id"] else "item",
            title=id,
        )
        for id in shown
    ]
    style = "good" if row[f"rank_{direction}"] <= 1 else "bad"
    asked = tag("div", _item(row, query, media, budget), tag("small", rank, class_=style), class_="query")
    return tag("div", asked, tag("div", items, class_="items"), class_="line")


def _item(row: Mapping[str, Any], modality: str, media: Media, budget: Budget) -> Markup:
    return show(row, modality, media, budget, side=SIDE, seconds=CLIP) or tag("p", row["id"], class_="absent")
