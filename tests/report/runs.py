"""A run folder as training leaves it, made up: for the tests of the report, and to look at one.

`python -m tests.report.runs FOLDER` writes one with its report.
"""

from __future__ import annotations

import csv
import io
import json
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from mmformer.report import Answers, describe_run, write_predictions
from mmformer.report.media import wav

SUBSETS = ("t", "i", "a", "ti", "ta", "ia")
SKILL = {"": 4.2, "ti": 1.6, "ta": 1.5, "ia": 1.1, "t": 0.4, "i": 0.3, "a": 0.2}
STARTED = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
KINDS = ("sum", "larger", "same", "written", "spoken", "difference")


def picture_file(seed: int, size: tuple[int, int] = (28, 28)) -> bytes:
    image = Image.new("L", size, seed * 7 % 40)
    draw = ImageDraw.Draw(image)
    width, height = size
    draw.ellipse((width * 0.2, height * 0.1, width * 0.8, height * 0.9), outline=230, width=max(width // 10, 1))
    draw.line((seed % width, 0, width - seed % width, height), fill=160, width=max(width // 14, 1))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def sound_file(seed: int, seconds: float = 0.7, rate: int = 8000) -> bytes:
    time = np.arange(int(seconds * rate)) / rate
    return wav(np.sin(2 * math.pi * (200 + 20 * seed) * time) * np.exp(-3 * time) * 0.5, rate)


def metric_rows(epochs: int = 20, steps: int = 40) -> list[dict[str, float]]:
    random = np.random.default_rng(0)
    rows: list[dict[str, float]] = []
    for step in range(0, epochs * steps, 10):
        share = step / (epochs * steps)
        rate = 1e-3 * min(1.0, share * 10) * (0.5 + 0.5 * math.cos(math.pi * share))
        loss = 3 * math.exp(-4 * share) + 0.05 + 0.15 * random.random()
        rows.append({"step": step, "epoch": step // steps, "train/loss": loss, "lr-AdamW": rate})
        if step % steps == 0:
            accuracy = 1 - math.exp(-5 * share)
            rows.append({"step": step, "epoch": step // steps, "val/loss": loss * 1.1 + 0.05, "val/acc": accuracy})
            rows[-1] |= {"val/f1": accuracy * 0.98, "train/acc": min(accuracy * 1.03, 1.0)}
    return rows


def answers(labels: int, count: int, subset: str = "") -> Answers:
    random = np.random.default_rng(len(subset))
    targets = np.arange(count) * 8 % labels
    outputs = random.normal(size=(count, labels))
    outputs[np.arange(count), targets] += SKILL[subset]
    outputs[:, 0] += 1.5 * (targets == 1)  # one confusion that stands out
    return Answers(ids=tuple(f"test-{i:05d}" for i in range(count)), outputs=outputs, targets=targets)


def write_run(folder: Path, labels: int = 21, count: int = 800, media: int = 40) -> Path:
    """A classification run of three modalities; the first `media` samples have a picture and a sound on disk."""
    names = [*(str(i) for i in range(labels - 2)), "yes", "no"]
    folder.mkdir(parents=True, exist_ok=True)
    files = folder.parent / "media"
    files.mkdir(exist_ok=True)
    for i in range(media):
        size = (28, 28) if i % 4 else (640, 400)
        (files / f"{i}.png").write_bytes(picture_file(i, size))
        (files / f"{i}.wav").write_bytes(sound_file(i))
    said = {subset: answers(labels, count, subset) for subset in ("", *SUBSETS)}
    accuracy = {s: float((a.outputs.argmax(1) == a.targets).mean()) for s, a in said.items()}
    rows = {
        id: {
            "text": f"what is the {KINDS[i % len(KINDS)]} of the <picture> & the sound?",
            "image": str(files / f"{i % media}.png") if i % 11 else None,
            "audio": str(files / f"{i % media}.wav") if i % 13 else None,
            "kind": KINDS[i % len(KINDS)],
            "voice": f"voice {i % 4}",
        }
        for i, id in enumerate(said[""].ids)
    }
    write_predictions(folder, said, names, rows, {"test-00003": "image: truncated"})
    history = metric_rows()
    columns = list(dict.fromkeys(name for row in history for name in row))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)
    metrics = {"test/acc": accuracy[""], "test/f1": accuracy[""] * 0.99, "test/loss": 0.31}
    metrics |= {f"test/acc_{s}": accuracy[s] for s in SUBSETS}
    metrics |= {"val/acc": 0.985, "val/loss": 0.12, "train/samples_per_s": 812.0}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.yaml").write_text(yaml.safe_dump({"task_name": "digits", "seed": 0, "data": {"path": None}}))
    reasons = ["truncated PNG: 812 of 1,024 bytes", "no such file", "empty: 0 bytes"]
    faults = [
        {"id": f"train-{i:05d}", "split": "train", "column": ("image", "audio")[i % 2], "path": f"media/{i}.png",
         "reason": reasons[i % 3]}
        for i in range(17)
    ]  # fmt: skip
    (folder / "data_errors.jsonl").write_text("\n".join(json.dumps(fault) for fault in faults))
    everything = "text+image+audio"
    counts = {"train": {everything: 8000, "text+image": 120, "text": 3}, "val": {everything: 800}}
    counts["test"] = {everything: count - 140, "text+image": 62, "text+audio": 73, "text": 5}
    command = ["python", "train.py", "experiment=digits", "trainer.max_epochs=20"]
    facts = {"seconds": 93.4, "parameters": 1_204_321, "device": "CPU, 2 threads", "majority": "yes"}
    describe_run(folder, STARTED, command, counts, **facts)
    return folder


if __name__ == "__main__":
    import sys
    import time

    from mmformer.report import write_report

    run = write_run(Path(sys.argv[1]))
    start = time.perf_counter()
    page = write_report(run)
    print(f"{page}: {page.stat().st_size / 1e3:.0f} kB in {time.perf_counter() - start:.2f} s")
