"""`mmformer models`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

MEASURED = Path(__file__).resolve().parents[1] / "checkpoints" / "families" / "measured.json"
"""What `python -m benchmarks.parity` wrote, last of all from the tests that compare with the originals."""


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every class and its difference.")] = False,
) -> None:
    """List the checkpoints that can be loaded, and how near each is to the original."""
    text = MEASURED.read_text(encoding="utf-8")
    if as_json:
        typer.echo(text.strip())
        return
    _show(json.loads(text))


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("family", "compared with", "gives", "resizes", "converts to"):
        table.add_column(name, overflow="fold")
    table.add_column("difference", justify="right", no_wrap=True)
    for name, family in found["families"].items():
        classes = family["classes"]
        columns = [", ".join(names) for names in (classes, family["parts"], family["resizes"], family["converts"])]
        table.add_row(name, *columns, f"{max(classes.values()):.1e}" if classes else "-")
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    typer.echo(
        "\ndifference: the greatest of any output, relative to the greatest of the reference or 1, float32 on a CPU,\n"
        f"from files of {versions}"
    )
