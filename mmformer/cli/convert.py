"""`mmformer convert`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmformer.cli.report import Run


class Target(StrEnum):
    """Libraries by name; `mmformer.checkpoints.libraries` has them, and imports PyTorch."""

    transformers = "transformers"
    timm = "timm"
    open_clip = "open_clip"


def convert(
    run: Run,
    to: Annotated[Target, typer.Option(help="The library that is to open it.")],
    output: Annotated[Path, typer.Option(help="The folder to write, which must not be there yet.")],
    part: Annotated[
        str | None, typer.Option(metavar="encoders.NAME", help="One encoder alone, such as encoders.image.")
    ] = None,
    near: Annotated[bool, typer.Option("--near", help="Let norms have the epsilon that the library knows.")] = False,
    check: Annotated[bool, typer.Option(help="Open the result with the library, if it is installed.")] = True,
) -> None:
    """Write a trained model, or one encoder of it, as a folder that another library opens with the same numbers."""
    from mmformer.checkpoints.convert import convert as write
    from mmformer.predict import find_model

    done = write(find_model(run), to.value, output, part=part, near=near, check=check)
    typer.echo(f"{done.folder}: {done.family}")
    if done.how:
        typer.echo(f"  {done.how}")
    for note in done.notes:
        typer.echo(f"  {note}")
