"""`mmformer predict`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmformer.cli.report import Run

if TYPE_CHECKING:
    from mmformer.predict import Answer, Predictor

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def predict(
    run: Run,
    image: Annotated[Path | None, typer.Option(help="A picture.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A recording.")] = None,
    text: Annotated[str | None, typer.Option(help="A text.")] = None,
    other: Annotated[
        list[str] | None, typer.Option("--with", metavar="NAME=VALUE", help="A further modality; may be repeated.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many labels to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every label.")] = False,
    rows: Annotated[
        Path | None, typer.Option("--input", help="Many samples: a manifest like that of training.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help=f"Where their predictions go ({', '.join(SUFFIXES)}); else to the screen.")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="A package of your own that the model uses; may be repeated.")
    ] = None,
) -> None:
    """Predict with a trained model: one sample, of any of its modalities, or the rows of a manifest."""
    sample: dict[str, Any] = {"text": text, "image": image, "audio": audio}
    sample |= dict(named(word, "--with") for word in other or [])
    sample = {name: value for name, value in sample.items() if value is not None}
    if bool(sample) == bool(rows):
        raise ValueError("give one sample (--text, --image, --audio) or a manifest (--input rows.csv), one of the two")
    if output is not None and (rows is None or output.suffix not in SUFFIXES):
        raise ValueError(f"--output {output}: it goes with --input and ends in one of {', '.join(SUFFIXES)}")
    predictor = open_run(run, allow)
    if rows is not None:
        _many(predictor, rows, output)
    else:
        _one(predictor.answer([sample])[0], top, as_json)


def open_run(run: Path, allow: Sequence[str] | None) -> Predictor:
    """The model of a run; with packages of the user's own, those in the working folder too."""
    from mmformer.predict import load

    if allow:
        sys.path.insert(0, "")  # as `python train.py` finds a package that lies in the working folder
    return load(run, allow=allow or ())


def named(word: str, option: str) -> tuple[str, str]:
    """The two sides of NAME=VALUE, which an option was given."""
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise ValueError(f"{option} {word}: write it as NAME=VALUE")
    return name, value


def _one(answer: Answer, top: int, as_json: bool) -> None:
    if as_json:
        import json

        shown = {"prediction": answer.prediction, "probabilities": answer.probabilities}
        typer.echo(json.dumps({k: v for k, v in shown.items() if v is not None}, ensure_ascii=False))
        return
    typer.echo(_words(answer.prediction))
    best = sorted((answer.probabilities or {}).items(), key=lambda pair: -pair[1])[:top]
    width = max((len(label) for label, _ in best), default=0)
    for label, share in best:
        typer.echo(f"  {label:<{width}}  {share:7.2%}")


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "(no label)"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _many(predictor: Predictor, rows: Path, output: Path | None) -> None:
    answers = predictor.answer(rows)
    table = [_row(answer) for answer in answers]
    if output is not None:
        write_table(table, output)
        typer.echo(f"{len(table):,} predictions in {output}", err=True)
    else:
        _write_separated(table, sys.stdout, ",")
    broken = [answer for answer in answers if answer.fault]
    if broken:
        few = "; ".join(f"{answer.id}: {answer.fault}" for answer in broken[:3])
        typer.echo(f"{len(broken):,} rows have something that could not be read: {few}; see column 'fault'", err=True)


def _row(answer: Answer) -> dict[str, Any]:
    row: dict[str, Any] = {"id": answer.id, "prediction": answer.prediction}
    if answer.probabilities is not None:
        if isinstance(answer.prediction, list):  # of each label that is said
            row["confidence"] = [answer.probabilities[label] for label in answer.prediction]
        else:
            row["confidence"] = max(answer.probabilities.values(), default=None)
    return row | {"fault": answer.fault}


def write_table(table: list[dict[str, Any]], path: Path) -> None:
    """Rows as a file of one of `SUFFIXES`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(table), path)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            import json

            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        else:
            _write_separated(table, file, "\t" if path.suffix == ".tsv" else ",")


def _write_separated(table: list[dict[str, Any]], file: Any, separator: str) -> None:
    import csv

    writer = csv.DictWriter(file, list(table[0]) if table else ["id", "prediction"], delimiter=separator)
    writer.writeheader()
    for row in table:
        # Several labels are written as a manifest writes them, their probabilities in the same order.
        joined = {k: "|".join(map(_cell, v)) if isinstance(v, list) else v for k, v in row.items()}
        writer.writerow(joined)


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
