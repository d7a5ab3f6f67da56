"""`mmformer chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mmformer.cli.predict import open_run
from mmformer.cli.report import Run

Files = list[Path] | None


def chat(
    run: Run,
    image: Annotated[Files, typer.Option(help="A picture that it is about; may be repeated.")] = None,
    audio: Annotated[Files, typer.Option(help="A recording that it is about; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each turn.")] = False,
    max_length: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token, more is more random.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    allow: Annotated[
        list[str] | None, typer.Option(help="A package of your own that the model uses; may be repeated.")
    ] = None,
) -> None:
    """Talk with a model that was trained on conversations: each line of the input is a turn.

    Pictures and recordings stand in front of the first turn, or where it says <image> and <audio>.
    """
    predictor = open_run(run, allow)
    media = {name: list(files) for name, files in (("image", image), ("audio", audio)) if files}
    said: list[str] = []
    for line in _lines():
        said.append(line if said else _with_media(line, media))
        answer = predictor.chat(said, media, max_length, _search(temperature, seed, len(said)))
        _show(said[-1], answer, as_json)
        said.append(answer)


def _lines() -> Iterator[str]:
    """The user's turns; asked for where someone sits in front of the screen."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            typer.echo("> ", nl=False)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()


def _with_media(line: str, media: dict[str, list[Path]]) -> str:
    """The first turn, with what stands for the media that it does not name."""
    lacking = [f"<{name}>" for name, files in media.items() for _ in files[line.count(f"<{name}>") :]]
    return " ".join([*lacking, line])


def _search(temperature: float, seed: int, turn: int) -> Any:
    from mmformer.generation import Greedy, Sampling

    return Sampling(temperature=temperature, seed=seed + turn) if temperature else Greedy()


def _show(line: str, answer: str, as_json: bool) -> None:
    if as_json:
        import json

        answer = json.dumps({"user": line, "assistant": answer}, ensure_ascii=False)
    typer.echo(answer)
    sys.stdout.flush()
