"""What Weights & Biases gets beside the curves: predictions with their pictures and sounds, and the best checkpoint."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mmformer.datasets.decode import decode_image
from mmformer.datasets.manifest import Manifest
from mmformer.datasets.sources import DecodeError
from mmformer.report import read_predictions
from mmformer.report.data import manifest_media

_ROWS = 64
_MAX_PIXELS = 50_000_000


def log_results(logger: Any, folder: Path, manifest: Manifest, metrics: Mapping[str, float]) -> None:
    """Final metrics, a table of the rows that were judged worst, and the best checkpoint with the model as artefact."""
    import wandb

    run = logger.experiment
    run.summary.update(dict(metrics))
    if (table := prediction_table(folder, manifest)) is not None:
        run.log({"predictions": table})
    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=dict(metrics))
    best = folder / "checkpoints" / "best.ckpt"
    if best.is_file():
        artifact.add_file(str(best))
    artifact.add_dir(str(folder / "model"), name="model")
    run.log_artifact(artifact, aliases=["best", "latest"])


def prediction_table(folder: Path, manifest: Manifest) -> Any:
    """The rows of the test split with the largest loss, as a table with media; None where nothing was predicted."""
    import wandb

    said = read_predictions(folder)
    if said is None or not len(said):
        return None
    losses = [math.inf if loss is None else float(loss) for loss in said.column("loss")]
    worst = sorted(range(len(said)), key=lambda place: -losses[place])[:_ROWS]
    media = manifest_media(manifest)
    show = {"image": _image, "audio": _audio}
    columns: list[Any] = ["id", *manifest.modalities, "target", "prediction", "loss"]
    table = wandb.Table(columns=columns)
    for row in said.rows(worst):
        cells = [show[name](media(row, name)) if name in show else row.get(name) for name in manifest.modalities]
        table.add_data(row["id"], *cells, str(row["target"]), str(row["prediction"]), row["loss"])
    return table


def _image(data: bytes | None) -> Any:
    import wandb

    if data is None:
        return None
    try:
        return wandb.Image(Image.fromarray(decode_image(data, _MAX_PIXELS).numpy()))
    except DecodeError:  # listed in data_errors.jsonl already
        return None


def _audio(data: bytes | None) -> Any:
    import soundfile
    import wandb

    if data is None:
        return None
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:  # listed in data_errors.jsonl already
        return None
    return wandb.Audio(samples.mean(1), sample_rate=rate)
