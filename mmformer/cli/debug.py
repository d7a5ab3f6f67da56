"""`mmformer debug`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

debug = typer.Typer(help="Look into what went wrong in a run.", no_args_is_help=True, rich_markup_mode=None)

File = Annotated[Path, typer.Argument(help="A batch that a run has kept, such as runs/a/nonfinite/step_000123_....pt.")]


@debug.command()
def batch(file: File) -> None:
    """Compute a batch again that made a loss or a gradient NaN or infinite, with the weights of that step."""
    import yaml

    from mmformer.training.replay import replay

    config = file.resolve().parent.parent / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"{config} is missing: leave the batch in the folder of its run")
    for line in replay(file, yaml.safe_load(config.read_text(encoding="utf-8"))).lines():
        typer.echo(line)


@debug.callback()
def _debug() -> None:
    """Look into what went wrong in a run."""
