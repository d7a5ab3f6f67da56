"""`mmformer capfilt`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmformer.cli.predict import SUFFIXES, open_run, write_table
from mmformer.cli.report import Run

if TYPE_CHECKING:
    from mmformer.generation import Search


def capfilt(
    run: Run,
    rows: Annotated[Path, typer.Argument(help="A manifest like that of training.")],
    output: Annotated[Path, typer.Option("--output", "-o", help=f"The new manifest ({', '.join(SUFFIXES)}).")],
    matcher: Annotated[Path | None, typer.Option(help="The run that filters, where it is not the one above.")] = None,
    modality: Annotated[
        str | None, typer.Option(help="What is written about, where rows have several: image, audio.")
    ] = None,
    split: Annotated[str, typer.Option(help="The rows to work on, others stay; `all` for all of them.")] = "train",
    threshold: Annotated[float, typer.Option(min=0, max=1, help="The least probability of a text to be kept.")] = 0.5,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Texts are drawn of that nucleus.")] = 0.9,
    beam: Annotated[int | None, typer.Option(min=1, help="Search by so many beams, instead of drawing.")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    allow: Annotated[
        list[str] | None, typer.Option(help="A package of your own that the model uses; may be repeated.")
    ] = None,
) -> None:
    """Write a text for each picture or sound, and keep the texts, old and new, that fit (CapFilt of BLIP)."""
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output {output}: it ends in one of {', '.join(SUFFIXES)}")
    from mmformer.capfilt import capfilt as filtered

    captioner = open_run(run, allow)
    judge = captioner if matcher is None else open_run(matcher, allow)
    found = filtered(
        captioner,
        judge,
        rows,
        modality,
        split=None if split == "all" else split,
        threshold=threshold,
        search=_search(top_p, beam, seed),
        max_length=max_length,
    )
    table, references = found.table(output, captioner.references)
    write_table(table, output)
    for source, (kept, judged) in found.counts().items():
        typer.echo(f"{source}: {kept:,} of {judged:,} texts kept", err=True)
    if found.faults:
        few = "; ".join(found.faults[:3])
        typer.echo(f"{len(found.faults):,} rows could not be read and are left out: {few}", err=True)
    named = "".join(f" data.references.{name}={where}" for name, where in references.items())
    typer.echo(f"{len(table):,} rows: data=manifest data.path={output}{named}", err=True)


def _search(top_p: float, beam: int | None, seed: int) -> Search:
    from mmformer.generation import Beam, Greedy, Sampling

    if beam is not None:
        return Beam(width=beam)
    return Sampling(top_p=top_p, seed=seed) if top_p else Greedy()
