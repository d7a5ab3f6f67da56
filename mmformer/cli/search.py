"""`mmformer search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmformer.cli.predict import named, open_run

if TYPE_CHECKING:
    from mmformer.predict import Predictor
    from mmformer.search import Hit

WIDTH = 100


def search(
    index: Annotated[Path, typer.Argument(help="The folder that `mmformer index` wrote.")],
    image: Annotated[Path | None, typer.Option(help="A picture.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A recording.")] = None,
    text: Annotated[str | None, typer.Option(help="A text.")] = None,
    other: Annotated[
        list[str] | None, typer.Option("--with", metavar="NAME=VALUE", help="A further modality; may be repeated.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many rows to find.")] = 10,
    keep: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="COLUMN=VALUE", help="Only rows with this value, or any of several."),
    ] = None,
    probes: Annotated[
        int | None, typer.Option(min=1, help="How many lists an approximate search reads: more miss less.")
    ] = None,
    rerank: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Judge the first N again, by the run's matching head.")
    ] = None,
    rows: Annotated[
        list[Path] | None, typer.Option(help="The manifest that was indexed, for --rerank; may be repeated.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="The run, where it no longer lies where the index says.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="A package of your own that the model uses; may be repeated.")
    ] = None,
) -> None:
    """Find what is most like a sample, of any of its modalities: several are averaged."""
    sample: dict[str, Any] = {"text": text, "image": image, "audio": audio}
    sample |= dict(named(word, "--with") for word in other or [])
    sample = {name: value for name, value in sample.items() if value is not None}
    if not sample:
        raise ValueError("nothing to search for: give any of --text, --image, --audio")
    from mmformer.search import Index
    from mmformer.search.embedding import FUSED, embed_query, fingerprint
    from mmformer.search.inverted import PROBES

    found = Index.load(index)
    if run is None and not Path(found.origin).exists():
        raise FileNotFoundError(f"{index} was built with {found.origin or 'a model in memory'}, which is not there: "
                                "say where it lies with --run")  # fmt: skip
    predictor = open_run(run or Path(found.origin), allow)
    fused = found.model.endswith(f":{FUSED}")
    where, second = _filters(keep or []), {}
    if rerank is not None:
        second, judged = _reranked(predictor, sample, rerank, rows)
        if not fused:
            where.setdefault("modality", judged)
    (hits,) = found.search(
        embed_query(predictor, sample, fused)[None],
        top,
        model=fingerprint(predictor, [FUSED] if fused else list(sample)),
        where=where,
        probes=probes or PROBES,
        **second,
    )
    _print(hits, as_json)


def _reranked(
    predictor: Predictor, sample: dict[str, Any], depth: int, rows: list[Path] | None
) -> tuple[dict[str, Any], list[str]]:
    """Options of a search whose first hits are judged again, and the modalities that these may be of."""
    from mmformer.search.matching import by_matching, judged_with

    judged = judged_with(predictor, sample)
    if not rows:
        raise ValueError("--rerank reads what it judges again: name the manifest that was indexed with --rows")
    return {"rerank": by_matching(predictor, sample, rows), "depth": depth}, judged


def _filters(words: list[str]) -> dict[str, list[str]]:
    filters: dict[str, list[str]] = {}
    for name, value in (named(word, "--filter") for word in words):
        filters.setdefault(name, []).append(value)
    return filters


def _print(hits: list[Hit], as_json: bool) -> None:
    if as_json:
        import json

        shown = [hit.row | {"id": hit.id, "score": hit.score} for hit in hits]
        typer.echo(json.dumps(shown, ensure_ascii=False, default=str))
        return
    if not hits:
        typer.echo("no row is left by the filters", err=True)
    width = max((len(hit.id) for hit in hits), default=0)
    for hit in hits:
        rest = "  ".join(f"{k}={v}" for k, v in hit.row.items() if k not in ("id", "modality") and v not in (None, ""))
        line = f"{hit.score:7.4f}  {hit.id:<{width}}  {hit.row['modality']:<6} {rest}"
        typer.echo(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…")
