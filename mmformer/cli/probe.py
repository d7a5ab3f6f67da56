"""`mmformer probe`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmformer.cli.report import Run

if TYPE_CHECKING:
    from mmformer.datasets.dataset import ManifestDataset
    from mmformer.datasets.manifest import Manifest
    from mmformer.model import Model

FUSED = "fused"
BATCH = 256


def probe(
    run: Run,
    k: Annotated[int, typer.Option(min=1, help="How many neighbours vote.")] = 20,
    temperature: Annotated[float, typer.Option(help="The lower, the more the nearest count.")] = 0.07,
    target: Annotated[str, typer.Option(help="The column of classes to predict.")] = "label",
    split: Annotated[str, typer.Option(help="The rows to judge on; those of train are the neighbours.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judge a run's embeddings by their nearest neighbours: how often do these have the same class?"""
    from mmformer.predict import load
    from mmformer.report.run import read_run

    predictor = load(run)
    manifest = _manifest(read_run(run).config)
    classes = _classes(manifest, target)
    found = {
        part: _rows(predictor.model, _dataset(manifest, part, predictor.features, classes)) for part in ("train", split)
    }
    both = [name for name in found[split] if name in found["train"]]
    judged = {name: _judge(found["train"][name], found[split][name], k, temperature) for name in both}
    if as_json:
        import json

        typer.echo(
            json.dumps({name: dict(zip(("accuracy", "rows"), pair, strict=True)) for name, pair in judged.items()})
        )
        return
    typer.echo(f"{k} neighbours, {target} of {split}")
    for name, (accuracy, count) in judged.items():
        typer.echo(f"  {name:<10} {accuracy:.4f}  ({count:,} rows)")


def _manifest(config: dict[str, Any]) -> Manifest:
    """The manifest of a run, read as it was for the training."""
    from mmformer.checkpoints import build

    return build(config["data"]["module"]["manifest"], origin="the run's config.yaml")()


def _classes(manifest: Manifest, target: str) -> Any:
    column = manifest.label if target == "label" else manifest.read_target(target)
    if column is None or column.kind != "Classes":
        kind = "is not there" if column is None else f"is of the kind {column.kind}"
        raise ValueError(f"{manifest.path}: {target} {kind}: a probe votes for classes; name a column (--target)")
    return column


def _dataset(manifest: Manifest, split: str, features: Any, classes: Any) -> ManifestDataset:
    from mmformer.datasets.dataset import ManifestDataset

    held = {name: feature for name, feature in features.items() if name in manifest.modalities}
    return ManifestDataset(manifest, split, held, targets={"probe": classes})


def _rows(model: Model, rows: ManifestDataset) -> dict[str, tuple[Any, Any]]:
    """Vectors and classes of the samples that have both: of what is fused, and of each modality."""
    import torch

    sources = {**({FUSED: None} if model.fusion is not None else {}), **{name: name for name in model.encoders}}
    parts: dict[str, list[tuple[Any, Any]]] = {name: [] for name in sources}
    for start in range(0, len(rows), BATCH):
        batch = rows.__getitems__([(0, i) for i in range(start, min(start + BATCH, len(rows)))])
        if not batch.inputs:
            continue
        with torch.inference_mode():
            encoded = model.encode(batch)
            for name, source in sources.items():
                vectors, present = model.summary(encoded, source)
                known = present & (batch.targets["probe"] >= 0)
                if known.any():
                    parts[name].append((vectors[known].float(), batch.targets["probe"][known]))
    joined = {name: tuple(map(torch.cat, zip(*found, strict=True))) for name, found in parts.items() if found}
    if not joined:
        raise ValueError(f"{rows.manifest.path}: no row could be read that has a class: see data_errors.jsonl")
    return joined  # pyright: ignore[reportReturnType]


def _judge(train: tuple[Any, Any], test: tuple[Any, Any], k: int, temperature: float) -> tuple[float, int]:
    from mmformer.training.probe import knn_probe

    votes = knn_probe(*train, test[0], k=k, temperature=temperature)
    return float((votes.argmax(-1) == test[1]).double().mean()), len(test[1])
