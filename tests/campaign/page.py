"""The table of a campaign as a page that asks nothing of a network."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmformer.report.html import Markup, render, section, table, tag
from mmformer.report.svg import bar

PACKAGES = ("torch", "pytorch-lightning", "pillow", "soundfile", "pyarrow", "safetensors")


def write_page(path: Path, results: Sequence[Any], about: Mapping[str, str], given: Mapping[str, Any]) -> Path:
    """Write the page, and return its path."""
    rows = [
        [
            result.name,
            about[result.name],
            tag("span", f"{result.passed:,} of {result.made:,}", class_="good" if result.good else "bad"),
            f"{len(result.trials) - result.made:,}",
            f"{result.seconds:.0f} s",
            bar(result.passed / max(1, result.made), style="s3" if result.good else "s2"),
        ]
        for result in results
    ]
    notes = [[result.name, note] for result in results for note in result.notes]
    failed = [[r.name, trial.name, trial.detail[:600]] for r in results for trial in r.failed]
    failed += [[r.name, "", r.broke] for r in results if r.broke]
    skipped = dict.fromkeys((r.name, trial.detail) for r in results for trial in r.trials if trial.skipped)
    facts = {"python": platform.python_version(), "system": platform.platform()}
    facts |= {name: version(name) for name in PACKAGES} | {name: str(value) for name, value in given.items()}
    style = Markup(files("mmformer.report").joinpath("style.css").read_text(encoding="utf-8"))
    head = tag("head", tag("meta", charset="utf-8"), tag("title", "Fault campaign"), tag("style", style))
    body = [
        tag("header", tag("h1", "Fault campaign"), tag("dl", [(tag("dt", k), tag("dd", v)) for k, v in facts.items()])),
        section("Trials", tag("div", table(["", "", "passed", "skipped", "time", ""], rows, (2, 3, 4)), class_="bars")),
        section("Failed", table(["", "trial", "what was seen"], failed) if failed else None),
        section("Published, without a bar", table(["", ""], notes) if notes else None),
        section("Skipped", table(["", "because"], [list(pair) for pair in skipped]) if skipped else None),
        section("Each trial", [_block(result) for result in results]),
    ]
    page = render([Markup("<!doctype html>\n"), tag("html", head, tag("body", tag("main", body)), lang="en")])
    path.write_text(page, encoding="utf-8")
    return path


def _block(result: Any) -> Markup:
    names = [[trial.name, "passed" if trial.passed else "failed", trial.detail[:200]] for trial in result.trials[:3000]]
    return tag("details", tag("summary", f"{result.name}: {len(result.trials):,}"), table(["trial", "", ""], names))
