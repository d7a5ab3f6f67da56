"""`mmformer evaluate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmformer.cli.predict import open_run
from mmformer.cli.report import Run

if TYPE_CHECKING:
    from mmformer.evaluate import Task


class Protocol(StrEnum):
    """What a model can be judged for."""

    classify = "classify"
    retrieval = "retrieval"
    zeroshot = "zeroshot"
    caption = "caption"
    transcribe = "transcribe"
    vqa = "vqa"


def evaluate(
    run: Run,
    data: Annotated[Path, typer.Option(help="A manifest like that of training.")],
    task: Annotated[Protocol, typer.Option(help="What the model is judged for.")] = Protocol.classify,
    split: Annotated[str, typer.Option(help="The rows to judge on; `all` for all of them.")] = "test",
    target: Annotated[
        str | None, typer.Option(help="The column of what is to be said, where it is not the label.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="A sentence with {} for a class's name, for zeroshot; may be repeated.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="The modality that zeroshot judges.")] = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="Add every subset of the modalities, and noise of growing strength.")
    ] = False,
    resamples: Annotated[int, typer.Option(min=1, help="For the intervals.")] = 1000,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder for evaluation.json and evaluation.html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="A package of your own that the model uses; may be repeated.")
    ] = None,
) -> None:
    """Judge a trained model by the protocols of the field, each number with its interval of confidence."""
    from dataclasses import replace

    from mmformer.evaluate import evaluate as judge
    from mmformer.evaluate.page import shown, write

    predictor = open_run(run, allow)
    chosen = _task(task, target, template, source)
    found = judge(
        predictor,
        data,
        chosen,
        None if split == "all" else split,
        robustness=robustness,
        resamples=resamples,
        tell=lambda line: typer.echo(line, err=True),
    )
    found = replace(found, facts={"run": str(run), "task": task.value} | dict(found.facts))
    page = write(found, output) if output is not None else None
    if as_json:
        import json

        from mmformer.evaluate.page import finite

        typer.echo(json.dumps(finite(found.plain()), ensure_ascii=False))
    else:
        width = max(map(len, found.metrics))
        for name, interval in found.metrics.items():
            typer.echo(f"{name:<{width}}  {shown(interval.value):>9}  {shown(interval.low)} to {shown(interval.high)}")
    if page is not None:
        typer.echo(page, err=True)


def _task(task: Protocol, target: str | None, template: list[str] | None, source: str | None) -> Task:
    from mmformer.evaluate import Classification, Retrieval, Written, ZeroShot, answers, captions, transcripts

    if task is not Protocol.zeroshot and (template or source):
        raise ValueError(f"--template and --source go with --task zeroshot, not with {task.value}")
    if task is Protocol.retrieval:
        return Retrieval()
    if task is Protocol.zeroshot:
        return ZeroShot(target or "label", template or ("{}",), source)
    if task is Protocol.caption:
        return Written(captions, target or "text")
    if task is Protocol.transcribe:
        return Written(transcripts, target or "text")
    if task is Protocol.vqa:
        return Written(answers, target or "answer", prompted=True)
    return Classification(target)
