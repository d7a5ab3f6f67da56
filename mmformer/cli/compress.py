"""`mmformer compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmformer.cli.report import Run


def compress(
    run: Run,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[recipe=NAME] [KEY=VALUE]...",
            help="A recipe (small, tiny, int8, mobile, or a .yaml of your own), and what of it is to be otherwise.",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A manifest; by default that which the run was trained on.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder; by default compress/<recipe> in the run's.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Most test rows to judge on.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="How often each model is timed.")] = 60,
) -> None:
    """Make a smaller, faster model of a run by a recipe, and show what that costs; what is done is not done again."""
    words = settings or []
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"{wrong[0]}: write recipe=NAME, or KEY=VALUE for what of the recipe is to be otherwise")
    name = next((word.partition("=")[2] for word in words if word.startswith("recipe=")), "small")
    overrides = [word for word in words if not word.startswith("recipe=")]
    from mmformer.cli.bench import table
    from mmformer.compress.pipeline import compress as run_recipe
    from mmformer.compress.pipeline import read_recipe

    recipe, _ = read_recipe(name, overrides)
    folder = output or run / "compress" / Path(name).stem
    found = run_recipe(
        run, recipe, folder, data, rows=rows, rounds=rounds, tell=lambda line: typer.echo(line, err=True)
    )
    typer.echo(table(list(found.measured)))
    typer.echo(f"best: {found.winner.name}; {found.page}", err=True)
