"""`mmformer index`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmformer.cli.report import Run

if TYPE_CHECKING:
    from mmformer.search import Index

MANY = 200_000
"""Rows from which on an exact search is slow enough to mention the other."""


def index(
    run: Run,
    rows: Annotated[Path, typer.Argument(help="A manifest like that of training.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the index.")],
    modality: Annotated[
        list[str] | None,
        typer.Option(help="What of each row to index; may be repeated. By default all; `fused` is the whole sample."),
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Add the rows to an index that is there.")] = False,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Search faster, and miss a few (needs mmformer[search]).")
    ] = False,
    half: Annotated[bool, typer.Option("--half", help="Keep vectors in 16 bits: half the size.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="A package of your own that the model uses; may be repeated.")
    ] = None,
) -> None:
    """Embed the rows of a manifest with a trained model, for `mmformer search`."""
    from mmformer.cli.predict import open_run
    from mmformer.search import Index
    from mmformer.search.embedding import FUSED, embed_rows, fingerprint
    from mmformer.search.storage import MANIFEST

    if (output / MANIFEST).exists() != add:
        there = "is an index already: add to it with --add" if not add else "is no index yet: leave --add out"
        raise ValueError(f"{output} {there}, or name another folder")
    predictor = open_run(run, allow)
    held = predictor.manifest(rows, labelled=False).modalities
    chosen = modality or [name for name in predictor.modalities if name in held]
    if FUSED in chosen and len(chosen) > 1:
        raise ValueError(f"--modality {FUSED} has a space of its own: index it alone")
    model = fingerprint(predictor, chosen)
    found: Index | None = Index.load(output) if add else None
    for name in chosen:
        vectors, table, faults = embed_rows(predictor, rows, name)
        _tell(name, len(vectors), faults)
        if found is None:
            found = Index.build(vectors, table, model=model, half=half)
        else:
            found = found.add(vectors, table, model=model)
    assert found is not None
    if approximate:
        found = _approximate(found)
    found.save(output, origin=run)
    hint = "" if found.inverted or len(found) < MANY else "; --approximate makes the search faster"
    typer.echo(f"{len(found):,} vectors of {found.dim} in {output}{hint}", err=True)


def _tell(name: str, count: int, faults: list[str]) -> None:
    typer.echo(f"{name}: {count:,} rows", err=True)
    if faults:
        few = "; ".join(faults[:3])
        typer.echo(f"{name}: {len(faults):,} rows could not be read and are left out: {few}", err=True)


def _approximate(found: Index) -> Index:
    try:
        return found.approximate()
    except ImportError as error:  # the user can mend it
        raise ValueError(str(error)) from error
