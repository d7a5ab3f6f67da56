"""`report.html`: one file that says how a run went and asks nothing of a network."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mmformer.report import gallery, results, samples
from mmformer.report.html import Markup, render, tag
from mmformer.report.run import Run, read_run
from mmformer.report.show import Media

FILE = "report.html"


def write_report(run_folder: Path | str, media: Media | None = None) -> Path:
    """Write `report.html` into a run folder from what lies there, and return its path.

    `media` reads the file in a column of a sample; where None, it is found through the manifest that the run's config
    names, and without one the columns of `predictions.parquet` are taken for paths. Files of a run that are missing
    leave their section out.

    Raises:
        FileNotFoundError: not a run folder.
        ValueError: a file of the run is damaged; the message names it.
    """
    run = read_run(Path(run_folder))
    page = build(run, media or _media(run))
    temporary = run.folder / f".{FILE}.tmp"
    temporary.write_text(page, encoding="utf-8")
    return temporary.replace(run.folder / FILE)


def _media(run: Run) -> Media:
    from mmformer.report.data import media_of  # imports torch, which listing runs does without

    return media_of(run.config) or read_path


def read_path(row: Mapping[str, Any], column: str) -> bytes | None:
    """The file that a cell names."""
    return Path(row[column]).read_bytes() if row.get(column) else None


def build(run: Run, media: Media) -> Markup:
    """The page as a string."""
    sections = [
        results.header(run),
        gallery.recalls(run),
        results.curves(run),
        results.subsets(run),
        results.groups(run),
        results.confusions(run),
        gallery.gallery(run, media),
        samples.written(run, media),
        samples.errors(run, media),
        samples.data(run),
        samples.faults(run),
        results.numbers(run),
        _config(run),
    ]
    style = Markup(files("mmformer.report").joinpath("style.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{run.name}: {run.folder.name}"),
        tag("style", style),
    )
    return render([Markup("<!doctype html>\n"), tag("html", head, tag("body", tag("main", sections)), lang="en")])


def _config(run: Run) -> Markup:
    if not run.config:
        return Markup()
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100)
    return tag("section", tag("details", tag("summary", "Configuration"), tag("pre", text)))
