"""The sections of a report about single samples: the worst errors, the data, what could not be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmformer.report.html import Markup, section, table, tag
from mmformer.report.predictions import Predictions
from mmformer.report.results import percent
from mmformer.report.run import Run
from mmformer.report.show import MEDIA_BYTES, Budget, Media, cut, show
from mmformer.report.svg import bar

CARDS = 12
MOST_FAULTS = 200
SHOWN = frozenset({"text", "image", "audio", "label"})
LOSS = {"Texts": "character error rate"}
"""What the loss of a sample is called, where it has another name."""


def errors(run: Run, media: Media, count: int = CARDS) -> Markup:
    """The samples with the largest loss, each with its picture, text and sound."""
    said = run.predictions
    if said is None or said.kind == "Texts" or not len(said):
        return Markup()
    scores = said.scores()
    wrong = np.flatnonzero(scores == 0) if said.kind != "Number" else np.flatnonzero(~np.isnan(scores))
    title, note = "Worst errors", f"Of {len(wrong):,} wrong answers, the {{}} with the largest loss."
    if said.kind == "Number":
        note = "The {} samples with the largest error."
    elif not len(wrong):
        wrong = np.flatnonzero(scores == 1)
        title, note = "Hardest samples", "No answer was wrong: the {} right ones with the largest loss."
    worst = _worst(said, wrong, count)
    return section(title, _cards(said, worst, media, MEDIA_BYTES), note=note.format(len(worst)))


def written(run: Run, media: Media, count: int = CARDS) -> Markup:
    """What was written about samples, beside what is wanted: where most letters are wrong, and drawn at random."""
    said = run.predictions
    if said is None or said.kind != "Texts" or not len(said):
        return Markup()
    wrong = np.flatnonzero(said.scores() < 1)
    worst, drawn = _worst(said, wrong, count), np.random.default_rng(0).permutation(len(said))[:count]
    share = MEDIA_BYTES // 2
    parts = [[tag("h3", "Drawn at random"), _cards(said, np.sort(drawn), media, share)]]
    if len(worst):
        parts.append([tag("h3", "The worst"), _cards(said, worst, media, share)])
    note = f"{len(wrong):,} of {len(said):,} samples have a text that is not as wanted."
    return section("What was written", parts, note=note)


def _worst(said: Predictions, places: np.ndarray, count: int) -> np.ndarray:
    """Of the samples in these places those of the largest loss."""
    losses = np.asarray(said.column("loss"), dtype=np.float64)
    return places[np.argsort(-losses[places], kind="stable")][:count]


def _cards(said: Predictions, places: np.ndarray, media: Media, size: int) -> Markup | None:
    budget = Budget(size)
    cards = [card(row, said, media, budget) for row in said.rows(places.tolist())]
    return tag("div", cards, class_="cards") if cards else None


def card(row: Mapping[str, Any], said: Predictions, media: Media, budget: Budget) -> Markup:
    """One sample: what it shows and says, what was answered, what is true."""
    # the text of a caption is what is wanted, and shown as that
    names = [name for name in ("image", "text", "audio") if name != "text" or row["target"] != [row.get("text")]]
    parts = [*(show(row, name, media, budget) for name in names), *_verdict(row, said)]
    others = [f"{n}: {cut(str(row[n]), 40)}" for n in said.extra if n not in SHOWN and row[n] is not None][:6]
    return tag(
        "article",
        parts,
        tag("p", " \u00b7 ".join(others), class_="id") if others else None,
        tag("p", row["id"], f" \u00b7 {LOSS.get(said.kind, 'loss')} {row['loss']:.3g}", class_="id"),
        tag("p", row["fault"], class_="id bad") if row.get("fault") else None,
        class_="card",
    )


def _verdict(row: Mapping[str, Any], said: Predictions) -> list[Markup]:
    if said.kind == "Texts":
        return [line for pair in zip(row["prediction"], row["target"], strict=True) for line in _compared(*pair)]
    target, answer = _words(row["target"]), _words(row["prediction"])
    right = row["target"] == row["prediction"]
    lines = [
        tag("div", "answered ", tag("span", answer, class_="good" if right else "bad")),
        tag("div", "is ", tag("span", target, class_="good")),
    ]
    if said.kind == "Classes":
        lines += [
            tag(
                "div",
                tag("span", guess["label"], title=guess["label"]),
                bar(guess["probability"], style="s3" if guess["label"] == row["target"] else "s2"),
                tag("span", f"{guess['probability']:.2f}"),
                class_="guess",
            )
            for guess in row["top"][:3]
        ]
    return lines


def _compared(written: str, wanted: str) -> list[Markup]:
    """A text that was written and, where it is another, the one that is wanted."""
    right = written == wanted
    lines = [tag("div", "wrote ", tag("span", cut(written) or "nothing", class_="good" if right else "bad"))]
    return lines if right else [*lines, tag("div", "is ", tag("span", cut(wanted), class_="good"))]


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def data(run: Run) -> Markup:
    """How many samples each split has, by what they have."""
    counts: Mapping[str, Mapping[str, int]] = run.about.get("data") or {}
    splits = [split for split in counts if counts[split]]
    combinations = dict.fromkeys(c for split in splits for c in counts[split])
    order = sorted(combinations, key=lambda c: (-c.count("+"), c))
    rows: list[Sequence[Any]] = [
        [c.replace("+", " + ") or "nothing", *(f"{counts[s].get(c, 0):,}" for s in splits)] for c in order
    ]
    if len(order) > 1:
        rows.append([tag("b", "all"), *(tag("b", f"{sum(counts[s].values()):,}") for s in splits)])
    parts = [table(["a sample has", *splits], rows, range(1, 1 + len(splits)))] if rows else []
    return section("Data", parts, _labels(run))


def _labels(run: Run) -> Markup | None:
    said = run.predictions
    if said is None or said.kind in ("Number", "Texts"):
        return None
    targets = [t for t in said.column("target") if t is not None]
    count = Counter(t for target in targets for t in (target if isinstance(target, list) else [target]))
    largest = max(count.values(), default=1)
    rows = [
        [label, f"{n:,}", percent(n / len(targets)), bar(n / largest)] for label, n in count.most_common(MOST_SHOWN)
    ]
    left = f"Labels of the test samples, the {MOST_SHOWN} most frequent of {len(said.labels)}"
    title = left if len(count) > MOST_SHOWN else "Labels of the test samples"
    bars = tag("div", table(["", "samples", "", ""], rows, (1, 2)), class_="bars")
    return tag("details", tag("summary", title), bars)


MOST_SHOWN = 40


def faults(run: Run) -> Markup:
    """What of the data could not be read, and why."""
    if not run.faults:
        return Markup()
    reasons = Counter((str(fault.get("column", "")), str(fault.get("reason", ""))) for fault in run.faults)
    summary = [[column, cut(reason), f"{count:,}"] for (column, reason), count in reasons.most_common(20)]
    names = [n for n in ("id", "split", "column", "path", "reason") if any(n in fault for fault in run.faults)]
    lines = [[cut(str(fault.get(n, ""))) for n in names] for fault in run.faults[:MOST_FAULTS]]
    every = tag("details", tag("summary", f"each of them ({len(lines)} of {len(run.faults):,})"), table(names, lines))
    note = f"{len(run.faults):,} cells could not be read and were left out; data_errors.jsonl lists every one."
    return section("Faults in the data", table(["column", "reason", "times"], summary, numeric=(2,)), every, note=note)
