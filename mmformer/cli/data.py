"""`mmformer data`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmformer.check import Checked

data = typer.Typer(help="Look at data before they train anything.", no_args_is_help=True, rich_markup_mode=None)

BROKEN = 2
"""Exit code where something cannot be used."""
MOST_SHOWN = 20

Rows = Annotated[Path, typer.Argument(help="A manifest, or a file of conversations, like that of training.")]
Pairs = Annotated[list[str] | None, typer.Option(help="As data.columns: image=photo; may be repeated.")]


@data.command()
def check(
    rows: Rows,
    column: Pairs = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="As data.references: image=pictures.parquet:image; may be repeated.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page of all that was found.")] = None,
    clean: Annotated[
        Path | None, typer.Option("--write-clean", help="Write the rows without a fault, beside the table.")
    ] = None,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Write the sha256 of each whole file beside the table.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode.")] = 1,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that decoding one file may take.")] = 60.0,
    max_pixels: Annotated[int, typer.Option(help="Larger pictures are refused, as in training.")] = 50_000_000,
    max_seconds: Annotated[float, typer.Option(help="Longer sounds are refused, as in training.")] = 60.0,
    allow_outside_root: Annotated[
        bool, typer.Option("--allow-outside-root", help="Read files outside the folder of the table.")
    ] = False,
) -> None:
    """Decode every file of a manifest, and list what is broken, odd, there twice, or leaks between splits.

    Checksums that lie beside the table are compared. Exit code 2 where something cannot be used.
    """
    from mmformer.check import check as look
    from mmformer.check import open_views, write_clean, write_page
    from mmformer.check.look import Limits
    from mmformer.datasets.integrity import sidecar, write_checksums

    options = {"references": _pairs(reference), "allow_outside_root": allow_outside_root}
    manifest, views = open_views(rows, dict(_pairs(column)), **options)
    compared = not checksums and sidecar(rows, manifest.table.name).is_file()
    if compared:
        manifest, views = open_views(rows, dict(_pairs(column)), **options, checksums=True)
    limits = Limits(max_pixels=max_pixels, max_seconds=max_seconds)
    with _bar() as tell:
        found = look(manifest, views, limits, seconds=timeout, workers=workers, tell=tell)
    if as_json:
        import json

        typer.echo(json.dumps(found.plain(), ensure_ascii=True, default=str))
    else:
        for line in _lines(found, compared):
            typer.echo(line)
    if clean is not None:
        typer.echo(f"{write_clean(found, clean):,} whole rows in {clean}", err=True)
    if checksums:
        digests = found.checksums()
        write_checksums(found.manifest.sums, digests)
        typer.echo(f"{len(digests):,} checksums in {found.manifest.sums}: train with data.checksums=true", err=True)
    if html is not None:
        typer.echo(write_page(found, html), err=True)
    if found.broken:
        raise typer.Exit(BROKEN)


def _lines(found: Checked, compared: bool) -> Iterator[str]:
    """What was found, for the screen."""
    sums = ", compared with their checksums" if compared else ""
    yield f"{found.manifest.path}: {len(found.manifest):,} rows, {found.num_files:,} files{sums}"
    yield from (f"  {note}" for note in (*found.manifest.notes, *found.warnings))
    for twins in found.twins:
        how = "nearly the same" if twins.nearly else "the same"
        leaks = ", ".join(f"{count:,} rows of {split}" for split, count in twins.leaked.items())
        if twins.copies or leaks:
            told = f"; train has what {leaks} have too, such as {' and '.join(twins.pairs[0])}" if leaks else ""
            yield f"  {twins.modality}: {twins.copies:,} copies that are {how}{told}"
    if found.odd:
        first = found.odd[0]
        yield f"  {len(found.odd):,} cells are odd, such as row {first.row}, {first.path}: {first.reason}"
    yield f"{len(found.broken):,} cells in {len(found.broken_rows):,} rows cannot be used"
    for fault in found.broken[:MOST_SHOWN]:
        yield f"  row {fault.row} (id {fault.id!r}), {fault.column}, {fault.path}: {fault.reason}"
    if len(found.broken) > MOST_SHOWN:
        yield f"  and {len(found.broken) - MOST_SHOWN:,} more: --html or --json lists all of them"


def _pairs(given: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in given or []:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{pair!r}: write it as image=photo")
        found[name] = value
    return found


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    import sys

    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("decoding", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@data.callback()
def _data() -> None:
    """Look at data before they train anything."""
