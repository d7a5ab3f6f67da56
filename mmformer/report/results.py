"""The sections of a report that say how good the model is: headline, subsets, groups, confusion, history."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mmformer.metrics.bootstrap import mean, percentile_interval
from mmformer.report.html import Markup, section, table, tag
from mmformer.report.predictions import COUNTED, Predictions
from mmformer.report.retrieval import Retrieval, chance
from mmformer.report.run import Run
from mmformer.report.statistics import confusion, majority
from mmformer.report.svg import Series, bar, line_chart

HEADLINES = {
    "acc": "accuracy",
    "map": "mean average precision",
    "f1": "F1",
    "mae": "mean absolute error",
    "r2": "R\u00b2",
    "rmse": "root mean squared error",
    "r@1": "recall at 1",
    "r@5": "recall at 5",
    "r@10": "recall at 10",
    "mean_recall": "mean recall",
    "exact": "texts written exactly",
    "wer": "word error rate",
    "cer": "character error rate",
    "perplexity": "perplexity",
    "loss": "loss",
}
"""The metric to lead with: the first of these that a run has."""
SHARES = frozenset({"acc", "f1", "map", "r@1", "r@5", "r@10", "mean_recall", "precision", "recall", "auroc", "top5"})
SHARES |= {"exact", "wer", "cer"}
INITIALS = {"t": "text", "i": "image", "a": "audio", "v": "video"}
COLORS = {"train": 1, "val": 2, "": 3}
INPUTS = frozenset({"text", "image", "audio"})
DIRECTION = re.compile(r"(\w2\w)_(.+)")
"""A metric of retrieval in one direction: `t2i_r@1`."""
BY_DIRECTION = " by direction"
MOST_CLASSES = 24
MOST_GROUPS = 30


@dataclass(frozen=True)
class Headline:
    """The metric a report leads with, and the split it was measured on."""

    split: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.split}/{self.name}"

    @property
    def share(self) -> bool:
        return self.name.lower() in SHARES

    def show(self, value: float) -> str:
        return percent(value) if self.share else f"{value:.4g}"


def percent(share: float) -> str:
    """A share of 1 as people read it: 0.125 -> 12.5 %."""
    return f"{share * 100:.1f}\u2009%"


def headline(run: Run) -> Headline | None:
    """What to lead with; None when the run has no metric of `HEADLINES`."""
    for split in ("test", "val"):
        for name in HEADLINES:
            for known in run.metrics:
                if known.lower() == f"{split}/{name}":
                    return Headline(split, known.split("/", 1)[1])
    return None


def interval(predictions: Predictions | None, name: str, value: float, subset: str = "") -> tuple[float, float] | None:
    """The bootstrap interval of a metric; None unless it is the mean of the samples' scores, or a metric of texts."""
    if predictions is None or (subset and subset not in predictions.subsets):
        return None
    if predictions.kind == "Texts":
        rows, statistic = predictions.counts(name, subset) if name in COUNTED else np.empty((0, 2)), _ratio
    else:
        rows, statistic = predictions.scores(subset), mean
        rows = rows[~np.isnan(rows)]
    if not len(rows) or abs(statistic(rows) - value) > 2e-3 * max(abs(value), 1e-9):
        return None
    found = percentile_interval(rows, statistic)
    return found.low, found.high


def _ratio(counts: np.ndarray) -> float:
    part, whole = counts.sum(0).tolist()
    return part / whole if whole else 0.0


def header(run: Run) -> Markup:
    """Task, headline beside chance and majority, the exact command, the versions."""
    lead = headline(run)
    tiles = [] if lead is None else _tiles(run, lead)
    about = run.about
    facts = {
        "folder": str(run.folder),
        "went on" if about.get("resumed") else "started": about.get("started"),
        "took": duration(about["seconds"]) if "seconds" in about else None,
        "parameters": f"{about['parameters']:,}" if "parameters" in about else None,
        "device": about.get("device"),
        "machine": about.get("platform"),
        "seed": run.config.get("seed"),
        "commit": about.get("commit"),
        "versions": ", ".join(f"{name} {number}" for name, number in about.get("versions", {}).items()),
    }
    shown = [(tag("dt", name), tag("dd", value)) for name, value in facts.items() if value not in (None, "")]
    command = about.get("command")
    return tag(
        "header",
        tag("h1", run.name),
        tag("p", run.folder.name, class_="sub"),
        tag("div", tiles, class_="tiles") if tiles else None,
        tag("pre", command) if command else None,
        tag("dl", shown),
    )


def duration(seconds: float) -> str:
    """Seconds as people read them: 93.4 -> 1 min 33 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _tiles(run: Run, lead: Headline) -> list[Markup]:
    value, said = run.metrics[lead.key], run.predictions
    sure = interval(said, lead.name, value)
    note = f" (95\u2009% interval {lead.show(sure[0])} to {lead.show(sure[1])})" if sure else ""
    split = {"test": "test", "val": "validation"}[lead.split]
    tiles = [_tile(lead.show(value), f"{HEADLINES[lead.name.lower()]}, {split}{note}", "tile main")]
    if said is not None and said.kind == "Classes" and lead.name == "acc":
        tiles += [_tile(percent(share), name) for share, name in baselines(run, said)]
    if said is not None and said.kind == "Number" and lead.name == "mae":
        tiles += _mean_tile(run, said)
    if run.retrieval is not None and lead.name == "r@1":
        tiles += _recall_tiles(run, run.retrieval, lead.split)
    if sampled := said or run.retrieval:
        tiles.append(_tile(f"{len(sampled):,}", "samples"))
    return tiles


def _mean_tile(run: Run, said: Predictions) -> list[Markup]:
    """The error of always giving the mean of what trained."""
    mean = (run.config.get("facts") or {}).get("mean")
    errors = [abs(target - mean) for target in said.column("target") if target is not None and mean is not None]
    return [_tile(f"{sum(errors) / len(errors):.4g}", "always the mean of training")] if errors else []


def _recall_tiles(run: Run, found: Retrieval, split: str) -> list[Markup]:
    """Recall at 5 and 10, and what chance gives at 1, all as means over the directions."""
    names = (name for name in ("r@5", "r@10") if f"{split}/{name}" in run.metrics)
    tiles = [_tile(percent(run.metrics[f"{split}/{name}"]), HEADLINES[name]) for name in names]
    sizes = [int((~np.isnan(found.ranks(direction))).sum()) for direction in found.directions]
    return [*tiles, _tile(percent(sum(chance(size, 1) for size in sizes) / len(sizes)), "by chance, at 1")]


def _tile(value: str, name: str, style: str = "tile") -> Markup:
    return tag("div", tag("b", value), tag("span", name), class_=style)


def baselines(run: Run, said: Predictions) -> list[tuple[float, str]]:
    """Accuracy of guessing at random and of always giving the most frequent label; nothing for other kinds."""
    targets = [target for target in said.column("target") if target is not None]
    if not targets or said.kind != "Classes":
        return []
    trained = run.about.get("majority")
    most, share = majority(targets, None if trained is None else [str(trained)])
    return [(1 / len(said.labels), "guessing"), (share, f"always \u201c{most}\u201d")]


def curves(run: Run) -> Markup:
    """Losses, metrics and learning rate over the steps."""
    found: dict[str, list[Series]] = {}
    for name, series in run.curves.items():
        if name == "epoch" or name.startswith("test/") or len(series.x) < 2:
            continue
        split, _, metric = name.rpartition("/")
        if name.lower().startswith("lr"):
            rates = found.setdefault("learning rate", [])
            rates.append(Series(name, series.x, series.y, len(rates) % 6 + 1))
        elif one := DIRECTION.fullmatch(metric):
            what = HEADLINES.get(one[2], one[2].replace("_", " "))
            lines = found.setdefault(what + BY_DIRECTION, [])
            lines.append(Series(one[1], series.x, series.y, len(lines) % 6 + 1))
        elif name.rpartition("_")[0] not in run.curves:  # not that of a subset of the modalities
            # Lightning adds _step and _epoch where a value is logged both ways: one chart shows both.
            metric = re.sub(r"_(step|epoch)$", "", metric)
            color = COLORS.get(split, 1 + sum(map(ord, split)) % 6)
            found.setdefault(metric, []).append(Series(split or name, series.x, series.y, color))
    names = sorted(found, key=_chart_order)
    charts = [line_chart(sorted(found[name], key=_split_order), HEADLINES.get(name, name)) for name in names[:12]]
    return section("Training", tag("div", charts, class_="charts") if charts else None)


def _chart_order(name: str) -> tuple[int, int, str]:
    """Loss, what a report may lead with, its parts by direction, the rest, and the learning rate last."""
    if name in HEADLINES:
        return (0 if name == "loss" else 1, list(HEADLINES).index(name), name)
    return (2 if name.endswith(BY_DIRECTION) else 4 if name == "learning rate" else 3, 0, name)


def _split_order(series: Series) -> tuple[int, str]:
    return (COLORS.get(series.name, len(COLORS)), series.name)


def spell(subset: str) -> str:
    """The modalities of a subset by their initials: `ia` -> image + audio."""
    return " + ".join(INITIALS.get(letter, letter) for letter in subset)


def subsets(run: Run) -> Markup:
    """The headline metric for every subset of the modalities, with its interval."""
    lead = headline(run)
    if lead is None:
        return Markup()
    pattern = re.compile(re.escape(lead.key) + r"_([a-z]+)$")
    found = {m[1]: v for k, v in run.metrics.items() if (m := pattern.fullmatch(k)) and set(m[1]) <= set(INITIALS)}
    if not found:
        return Markup()
    marks = [value for value, _ in baselines(run, run.predictions)] if run.predictions and lead.share else []
    mark = max(marks, default=None)
    rows = [("everything", "", run.metrics[lead.key])]
    rows += [(spell(s), s, found[s]) for s in sorted(found, key=lambda s: (-len(s), s))]
    note = "What the model reaches when it is given only these modalities of each test sample."
    if mark is not None:
        note += " The upright line is the better of guessing and the most frequent label."
    return section("By subset of the modalities", _bars(run, lead, rows, mark), note=note)


def _bars(run: Run, lead: Headline, rows: Sequence[tuple[str, str, float]], mark: float | None) -> Markup:
    largest = 1.0 if lead.share else max((value for _, _, value in rows), default=1.0) or 1.0
    cells = []
    for name, subset, value in rows:
        sure = interval(run.predictions, lead.name, value, subset)
        reach = (sure[0] / largest, sure[1] / largest) if sure else None
        scale = 100 if lead.share else 1
        text = f"{sure[0] * scale:.3g}\u00a0\u2013\u00a0{sure[1] * scale:.3g}" if sure else ""
        drawing = bar(value / largest, reach, mark, "s1" if not subset else "s3")
        cells.append([name, lead.show(value), tag("span", text, class_="faint"), drawing])
    shown = HEADLINES[lead.name.lower()]
    return tag("div", table(["given", shown, "95\u2009% interval", ""], cells, numeric=(1,)), class_="bars")


def groups(run: Run) -> Markup:
    """Accuracy (or what goes for it) by every column of the manifest that divides the samples into few groups."""
    said = run.predictions if run.predictions is not None else run.retrieval
    if said is None:
        return Markup()
    scores, measure = said.scores(), _measure(said)
    parts = []
    targets = [str(target) for target in said.column("target")] if isinstance(said, Predictions) else []
    for name in said.extra:
        values = said.column(name)
        if name in INPUTS:
            continue
        kinds = sorted({value for value in values if value is not None}, key=_natural)
        if not 2 <= len(kinds) <= min(MOST_GROUPS, len(said) // 3) or values == targets:
            continue
        rows = [(kind, scores[[v == kind for v in values]]) for kind in kinds]
        parts.append(tag("div", tag("h3", name), _group_table(rows, measure)))
    return section(f"{measure.capitalize()} by group", tag("div", parts[:6], class_="charts wide") if parts else None)


def _measure(said: Predictions | Retrieval) -> str:
    """What the mean of the samples' scores is called."""
    if isinstance(said, Retrieval):
        return "recall at 1"
    return {"Number": "mean absolute error", "Texts": HEADLINES["exact"]}.get(said.kind, "accuracy")


def _natural(value: str) -> tuple[bool, float, str]:
    try:
        return (False, float(value), value)
    except ValueError:
        return (True, 0.0, value)


def _group_table(rows: Iterable[tuple[str, np.ndarray]], measure: str) -> Markup:
    error = measure == "mean absolute error"
    known = [(name, scores[~np.isnan(scores)]) for name, scores in rows]
    known = [(name, scores) for name, scores in known if len(scores)]
    largest = max((float(scores.mean()) for _, scores in known), default=1.0) or 1.0 if error else 1.0
    cells = []
    for name, scores in known:
        found = percentile_interval(scores)
        text = f"{found.value:.4g}" if error else percent(found.value)
        drawing = bar(found.value / largest, (found.low / largest, found.high / largest))
        cells.append([name, len(scores), text, drawing])
    header = ["", "samples", {"mean absolute error": "error", "recall at 1": "R@1"}.get(measure, measure), ""]
    return tag("div", table(header, cells, numeric=(1, 2)), class_="bars")


def confusions(run: Run) -> Markup:
    """Which label was taken for which: a matrix, of the most confused labels where there are many."""
    said = run.predictions
    if said is None or said.kind != "Classes":
        return Markup()
    pairs = [
        (target, answer)
        for target, answer in zip(said.column("target"), said.column("prediction"), strict=True)
        if target is not None
    ]
    if not pairs:
        return Markup()
    counts = confusion([t for t, _ in pairs], [p for _, p in pairs], said.labels)
    wrong = counts - np.diag(np.diag(counts))
    order = np.flatnonzero(counts.sum(0) + counts.sum(1)).tolist()
    note = "A row is what is true, a column what was answered; shading is the share of the row."
    if len(order) > MOST_CLASSES:
        most = np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:MOST_CLASSES]
        order = sorted(most.tolist())
        note += f" Of {len(said.labels)} labels, the {MOST_CLASSES} that were confused most."
    shown = tag("div", _matrix(counts, said.labels, order), _pairs(wrong, counts, said.labels), class_="beside")
    return section("Confusion", shown, note=note)


def _matrix(counts: np.ndarray, labels: Sequence[str], order: Sequence[int]) -> Markup:
    rows = []
    for i in order:
        total = max(int(counts[i].sum()), 1)
        cells: list[Markup | str] = [tag("span", labels[i], title=labels[i])]
        for j in order:
            count, share = int(counts[i, j]), counts[i, j] / total
            # Small shares must still be seen: errors are what one looks for.
            shade = 0 if not count else 12 + 88 * share
            style = "full" if shade > 55 else "some" if count else ""
            cells.append(
                tag(
                    "span",
                    count or "\u00b7",
                    class_=f"cell {'s1' if i == j else 's2'} {style}",
                    style=f"--share:{shade:.0f}%",
                    title=f"{labels[i]} answered as {labels[j]}: {count} of {total}",
                )
            )
        rows.append(cells)
    head = ["", *(tag("span", labels[j], title=labels[j]) for j in order)]
    return tag("div", table(head, rows), class_="matrix")


def _pairs(wrong: np.ndarray, counts: np.ndarray, labels: Sequence[str]) -> Markup | None:
    places = [divmod(int(k), len(labels)) for k in np.argsort(-wrong, axis=None, kind="stable")[:8]]
    rows = [
        [labels[i], labels[j], int(wrong[i, j]), percent(wrong[i, j] / max(counts[i].sum(), 1))]
        for i, j in places
        if wrong[i, j]
    ]
    if not rows:
        return None
    return tag(
        "div", tag("h3", "Most frequent confusions"), table(["true", "answered", "times", "of the row"], rows, (2, 3))
    )


def calibration(run: Run) -> list[tuple[str, float]]:
    """The expected calibration error, where the run has probabilities of one label."""
    said = run.predictions
    if said is None or said.kind != "Classes":
        return []
    scores, confidence = said.scores(), np.asarray(said.column("confidence"), dtype=np.float64)
    known = ~np.isnan(scores)
    if not known.any():
        return []
    # They import torch, which listing runs does without.
    import torch

    from mmformer.metrics.calibration import expected_calibration_error, reliability

    found = reliability(torch.from_numpy(confidence[known]), torch.from_numpy(scores[known] == 1))
    return [("expected calibration error", expected_calibration_error(found))]


def numbers(run: Run) -> Markup:
    """Every final metric, a row a name and a column a split."""
    splits = [split for split in ("train", "val", "test") if any(k.startswith(f"{split}/") for k in run.metrics)]
    names = dict.fromkeys(key.split("/", 1)[1] for key in run.metrics if key.split("/", 1)[0] in splits)
    rows = [
        [name, *(f"{run.metrics[f'{s}/{name}']:.5g}" if f"{s}/{name}" in run.metrics else "" for s in splits)]
        for name in names
    ]
    other = [(key, value) for key, value in run.metrics.items() if key.split("/", 1)[0] not in splits]
    parts = [table(["", *splits], rows, numeric=range(1, 1 + len(splits)))] if rows else []
    extra = [[name, f"{value:.5g}"] for name, value in [*other, *calibration(run)]]
    parts += [table(["", ""], extra, numeric=(1,))] if extra else []
    return section("All metrics", parts)
