"""Make the degraded digit pairs ready to train on: `uv run python data/avdigits/prepare.py SOURCE`.

SOURCE holds mnist.parquet, fsdd.zip and pairs.csv (see README.md). The recordings of the test are degraded by the
babble of six other recordings and white noise at -10 dB. There is one degraded version of each training recording;
this script makes more of the clean ones, of training recordings only, so that a model cannot learn the noise by heart.
"""

from __future__ import annotations

import argparse
import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf

HERE = Path(__file__).resolve().parent
RATE = 8000
VOICES = 6
WHITE = (0.1, 0.3)  # share of white noise in the noise's power; about 0.2 in the degraded recordings
DECIBELS = (-12.0, -4.0)  # a little easier at the upper end than the test, which eases learning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with mnist.parquet, fsdd.zip and pairs.csv")
    parser.add_argument("--versions", type=int, default=10, help="noisy versions of each training recording")
    options = parser.parse_args()
    write_pictures(options.source / "mnist.parquet")
    write_recordings(options.source / "fsdd.zip", options.versions)
    write_pairs(options.source / "pairs.csv", options.versions)


def write_pictures(path: Path) -> None:
    table = pq.read_table(path, columns=["id", "image_degraded"])
    pq.write_table(table.rename_columns(["id", "image"]), HERE / "pictures.parquet")


def write_recordings(path: Path, versions: int) -> None:
    """Noisy versions of the training recordings under `<id>#<version>`, and the given ones of the other splits."""
    ids, recordings = [], []
    with zipfile.ZipFile(path) as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("manifest.csv").decode())))
        clean = {row["id"]: read(archive, row["audio"]) for row in rows if row["split"] == "train"}
        for row in rows:
            if row["split"] != "train":
                ids.append(row["id"])
                recordings.append(archive.read(row["audio_degraded"]))
    names = sorted(clean)
    for number, name in enumerate(names):
        for version in range(versions):
            random = np.random.default_rng([number, version])
            ids.append(f"{name}#{version}")
            recordings.append(encode(degrade(clean[name], [clean[other] for other in names], random)))
    pq.write_table(pa.table({"id": ids, "audio": recordings}), HERE / "recordings.parquet")


def read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    samples, _ = sf.read(io.BytesIO(archive.read(name)), dtype="float32")
    return samples


def encode(samples: np.ndarray) -> bytes:
    out = io.BytesIO()
    sf.write(out, 0.5 * samples / np.abs(samples).max(), RATE, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def degrade(speech: np.ndarray, others: list[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """A recording in the babble of several others and white noise."""
    babble = sum(stretch_of(others[random.integers(len(others))], len(speech), random) for _ in range(VOICES))
    share = random.uniform(*WHITE)
    white = random.standard_normal(len(speech)).astype(np.float32)
    noise = np.sqrt(1 - share) * unit(babble) + np.sqrt(share) * white
    return unit(speech) + unit(noise) * 10 ** (-random.uniform(*DECIBELS) / 20)


def stretch_of(samples: np.ndarray, length: int, random: np.random.Generator) -> np.ndarray:
    """A part of so many samples, from anywhere, of a recording that is repeated."""
    start = random.integers(len(samples))
    return unit(np.resize(np.roll(samples, -start), length))


def unit(samples: np.ndarray) -> np.ndarray:
    return samples / (samples.std() + 1e-8)


def write_pairs(path: Path, versions: int) -> None:
    """The pairs, each training row with one of the versions of its recording."""
    with path.open() as source, (HERE / "pairs.csv").open("w", newline="") as target:
        rows = csv.DictReader(source)
        writer = csv.writer(target)
        writer.writerow(["id", "split", "image", "audio", "label"])
        for number, row in enumerate(rows):
            audio = f"{row['audio']}#{number % versions}" if row["split"] == "train" else row["audio"]
            writer.writerow([row["id"], row["split"], row["image"], audio, row["label"]])


if __name__ == "__main__":
    main()
