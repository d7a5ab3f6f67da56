"""What a check found, as one page that asks nothing of a network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mmformer.check.charts import histogram
from mmformer.check.check import Broken, Checked, View, class_counts
from mmformer.datasets.splits import SPLITS
from mmformer.report.data import count_data
from mmformer.report.html import Markup, render, section, table, tag
from mmformer.report.show import MEDIA_BYTES, Budget, cut, show
from mmformer.report.svg import bar

CARDS = 24
MOST_LISTED = 500
MOST_CLASSES = 60
MEASURES = {
    "image": (("width", "pixels"), ("height", "pixels")),
    "audio": (("duration", "seconds"), ("sample rate", "Hz"), ("channels", "")),
    "text": (("length", "characters"),),
}


def write_page(checked: Checked, path: Path) -> Path:
    """Write the page, and return its path."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(build(checked), encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path


def build(checked: Checked) -> Markup:
    """The page as a string."""
    title = f"Data: {checked.manifest.path.name}"
    style = Markup(files("mmformer.report").joinpath("style.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", style),
    )
    body = [
        _header(checked, title),
        _faults("What cannot be used", checked.broken),
        _twins(checked),
        _presence(checked),
        _classes(checked),
        section("Sizes", tag("div", list(_histograms(checked)), class_="charts")),
        _gallery(checked),
        _faults("What is odd, and usable", checked.odd),
    ]
    return render([Markup("<!doctype html>\n"), tag("html", head, tag("body", tag("main", body)), lang="en")])


def _header(checked: Checked, title: str) -> Markup:
    leaked = sum(sum(twins.leaked.values()) for twins in checked.twins if twins.modality == "row")
    numbers = {
        "rows": len(checked.manifest),
        "files": checked.num_files,
        "rows with a broken cell": len(checked.broken_rows),
        "rows held out that train has too": leaked,
    }
    tiles = [tag("div", tag("b", f"{value:,}"), tag("span", name), class_="tile") for name, value in numbers.items()]
    notes = [tag("li", note) for note in (*checked.manifest.notes, *checked.warnings)]
    return tag("header", tag("h1", title), tag("div", tiles, class_="tiles"), tag("ul", notes))


def _faults(title: str, listed: Sequence[Broken]) -> Markup:
    if not listed:
        return Markup()
    reasons = Counter((fault.column, cut(fault.reason, 120)) for fault in listed)
    summary = [[column, reason, f"{count:,}"] for (column, reason), count in reasons.most_common(20)]
    lines = [[f"{f.row:,}", f.id, f.column, cut(f.path), cut(f.reason)] for f in listed[:MOST_LISTED]]
    every = tag(
        "details",
        tag("summary", f"each of them ({len(lines):,} of {len(listed):,})"),
        table(["row", "id", "column", "path", "reason"], lines, (0,)),
    )
    return section(title, table(["column", "reason", "times"], summary, (2,)), every)


def _twins(checked: Checked) -> Markup:
    rows, pairs = [], []
    for twins in checked.twins:
        how = "nearly the same" if twins.nearly else "the same"
        leaks = [f"{twins.leaked.get(split, 0):,}" for split in SPLITS[1:]]
        rows.append([twins.modality, how, f"{twins.copies:,}", *leaks])
        pairs += [[twins.modality, how, cut(held), cut(train)] for held, train in twins.pairs]
    if not rows:
        return Markup()
    header = ["", "", "copies", *(f"rows of {split} that train has too" for split in SPLITS[1:])]
    shown = tag("details", tag("summary", f"examples ({len(pairs)})"), table(["", "", "held out", "trains"], pairs))
    note = (
        "The same: equal bytes; of texts, equal words. Nearly the same: pictures and sounds whose coarse fingerprints"
        " agree, each to be looked at. Nearly counts what is the same too."
    )
    return section("Copies and leaks", table(header, rows, range(2, 5)), shown if pairs else None, note=note)


def _presence(checked: Checked) -> Markup:
    counts = count_data(checked.manifest)
    combinations = dict.fromkeys(c for split in counts.values() for c in split)
    order = sorted(combinations, key=lambda c: (-c.count("+"), c))
    rows = [[c.replace("+", " + ") or "nothing", *(f"{counts[s].get(c, 0):,}" for s in counts)] for c in order]
    rows.append([tag("b", "all"), *(tag("b", f"{sum(split.values()):,}") for split in counts.values())])
    return section("What samples have", table(["a sample has", *counts], rows, range(1, 1 + len(counts))))


def _classes(checked: Checked) -> Markup:
    label = checked.manifest.label
    if label is None:
        return Markup()
    if not label.names:
        known = label.values[label.present].tolist()
        return section("Label", tag("div", histogram(known, label.column, ""), class_="charts"))
    counts = class_counts(checked.manifest)
    order = np.argsort(-counts.sum(1), kind="stable")
    largest = max(1, int(counts.sum(1).max()))
    rows = [
        [label.names[i], *(f"{n:,}" for n in counts[i].tolist()), bar(float(counts[i].sum()) / largest)]
        for i in order[:MOST_CLASSES].tolist()
    ]
    title = f"Classes of {label.column!r}" + (
        f", the {MOST_CLASSES} largest of {len(order):,}" if len(order) > len(rows) else ""
    )
    return section(title, tag("div", table(["", *SPLITS, ""], rows, (1, 2, 3)), class_="bars"))


def _histograms(checked: Checked) -> Any:
    for view in checked.views:
        looks = [look for look in checked.looks[view.modality].values() if not look.reason]
        for place, (name, unit) in enumerate(MEASURES.get(view.modality, ())):
            values = [look.shape[place] for look in looks if len(look.shape) > place]
            yield histogram(values, f"{view.modality}: {name}", unit)
        if view.modality != "text":
            yield histogram([look.size / 1000 for look in looks], f"{view.modality}: size of a file", "kB")


def _gallery(checked: Checked) -> Markup:
    """Rows drawn at random, of those that are whole."""
    whole = np.setdiff1d(np.arange(len(checked.manifest)), checked.broken_rows)
    drawn = np.sort(np.random.default_rng(0).permutation(whole)[:CARDS])
    budget = Budget(MEDIA_BYTES)
    cards = [_card(checked, int(row), budget) for row in drawn]
    note = f"{len(cards)} rows drawn at random from those without a fault."
    return section("Samples", tag("div", cards, class_="cards"), note=note) if cards else Markup()


def _card(checked: Checked, row: int, budget: Budget) -> Markup:
    manifest = checked.manifest
    parts = [
        _shown(view, cell, budget) for view in checked.views for cell in np.flatnonzero(view.rows == row)[:2].tolist()
    ]
    about = [manifest.id(row), SPLITS[manifest.split[row]]]
    if (label := manifest.label) is not None and label.present[row]:
        target = manifest.target(row)
        marked = [i for i, on in enumerate(target) if on] if label.kind == "Labels" else [target]
        said = ", ".join(label.names[i] for i in marked) if label.names else f"{target:.4g}"
        about.append(f"{label.column}: {said}")
    return tag("article", parts, tag("p", " \u00b7 ".join(about), class_="id"), class_="card")


def _shown(view: View, cell: int, budget: Budget) -> Markup | None:
    if view.modality == "text":
        return show({"text": view.manifest.text(cell)}, "text", lambda *_: None, budget)

    def read(row: Any, modality: str) -> bytes | None:
        source = view.manifest.source(view.modality, cell)
        if source is None:
            return None
        with source.open() as stream:
            return stream.read()

    return show({}, view.modality, read, budget) if view.modality in MEASURES else None
