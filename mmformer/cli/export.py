"""`mmformer export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmformer.cli.predict import open_run
from mmformer.cli.report import Run

if TYPE_CHECKING:
    from mmformer.export import Exported


class Format(StrEnum):
    """What a model can be written as."""

    onnx = "onnx"
    pt2 = "pt2"
    pte = "pte"


def export(
    run: Run,
    format: Annotated[
        Format, typer.Option(help="ONNX; torch.export (pt2); ExecuTorch for phones (pte).")
    ] = Format.onnx,
    int8: Annotated[
        bool, typer.Option("--int8", help="Weights of 8 bits, activations quantized as they come.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; by default in the folder `export` of the run.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A manifest to check the file with; by default the run's own test rows.")
    ] = None,
    split: Annotated[str, typer.Option(help="The rows of --data to check with; `all` for all of them.")] = "test",
    encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="One encoder alone, such as image, for its embeddings.")
    ] = None,
    picture: Annotated[
        str | None, typer.Option(metavar="HEIGHTxWIDTH", help="The size of pictures, where training bounds none.")
    ] = None,
    package: Annotated[
        bool, typer.Option("--package", help="Compile a .pt2 file for this machine (AOTInductor; needs g++).")
    ] = False,
    index: Annotated[
        Path | None, typer.Option(help="With --encoder: also write this index (`mmformer index`) as one .npz file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="A package of your own that the model uses; may be repeated.")
    ] = None,
) -> None:
    """Write a trained model as a file that runs without this package, checked on real rows."""
    from mmformer.export import Options, known_rows, rows_of
    from mmformer.export import export as write

    predictor = open_run(run, allow)
    options = Options(int8=int8, encoder=encoder, picture=_size(picture), package=package)
    chosen = None if split == "all" else split
    samples = known_rows(predictor, run) if data is None else rows_of(predictor, data, chosen)
    path = output or run / "export" / f"{encoder or 'model'}{'_int8' if int8 else ''}.{format.value}"
    if path.suffix != f".{format.value}":
        raise ValueError(f"--output {path}: a file of --format {format.value} ends in .{format.value}")
    if index is not None and encoder is None:
        raise ValueError(f"--index {index}: say what will be searched with (--encoder NAME)")
    done = write(predictor, path, samples, options)
    if index is not None:
        from mmformer.export.index import write_table

        typer.echo(write_table(index, predictor, str(encoder), path.with_name(f"{index.name}.npz")), err=True)
    if as_json:
        import json

        typer.echo(json.dumps(_plain(done)))
        return
    typer.echo(f"{done.path}: {done.size / 1e6:.1f} MB, written in {done.seconds:.0f} s")
    for compared in done.compared:
        typer.echo(f"  {compared.line()}")


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(f"--picture {text}: write it as HEIGHTxWIDTH, such as 224x224")
    return int(sides[0]), int(sides[1])


def _plain(done: Exported) -> dict[str, Any]:
    from dataclasses import asdict

    shown = {"path": str(done.path), "bytes": done.size, "seconds": done.seconds, "difference": done.difference}
    return shown | {"compared": [asdict(compared) for compared in done.compared]}
