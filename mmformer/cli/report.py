"""`mmformer report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/digits/2026-01-31_12-00-00.")]


def report(run: Run) -> None:
    """Write report.html of a run again, from what lies in its folder."""
    from mmformer.report import write_report

    typer.echo(write_report(run))
