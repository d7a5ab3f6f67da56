"""Make the embedded data set: handwritten digits, spoken digits and written questions about both.

    sudo apt-get install espeak-ng
    uv run python data/digits/prepare.py

Writes `pictures.parquet`, `speech.parquet` and `questions.csv` beside this file and the figures of `README.md`.
The result depends on the seed and on the version of espeak-ng only.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, cycle, product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image
from scipy.signal import resample_poly
from sklearn.datasets import load_digits

SPLITS = ("train", "val", "test")
RATE = 8000  # Hz
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PICTURE_SHARE = {"train": 0.7, "val": 0.1, "test": 0.2}
TAKES = 2  # recordings of each digit by each voice

# A voice is an accent and a variant (the shape of the vocal tract). No variant is in two splits, nor are two of a
# family (iven, iven2).
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-029")
VARIANTS = {
    "train": (
        "m1 f1 m2 f2 m3 f3 m4 m5 Alex Alicia Andrea Andy Annie aunty belinda benjamin boris caleb david Denis Diogo ed "
        "edward edward2 Gene Gene2 gustave Henrique Hugo iven iven2 iven3 Jacky john kaukovalta klatt klatt4 Lee "
        "marcelo Marco Mario max Michael michel miguel Mike paul pedro quincy RicishayMax rob robert sandro steph "
        "steph2 Tweaky UniRobot"
    ),
    "val": "m6 f5 adam antonio zac norbert travis croak",
    "test": "m7 m8 f4 anika announcer grandma grandpa linda Nguyen pablo robosoft robosoft5 shelby victor",
}

# Rows of `questions.csv` for each of the 10 x 10 pairs of digits, by split: every kind asks about every pair equally
# often, so the chance levels are exact and the same in each split.
REPEATS = {"train": 40, "val": 2, "test": 5}
KINDS: dict[str, Callable[[int, int], int]] = {
    "image": lambda seen, heard: seen,
    "audio": lambda seen, heard: heard,
    "max": max,
    "min": min,
}
ADJECTIVES = {
    "image": ("written", "handwritten", "drawn"),
    "audio": ("spoken", "heard", "said"),
    "max": ("larger", "greater", "bigger"),
    "min": ("smaller", "lower", "lesser"),
}
OPENINGS = ("say the", "read the", "name the", "give the", "tell me the", "what is the")
NOUNS = ("digit", "number")


@dataclass(frozen=True)
class Question:
    """A row of `questions.csv`; `image` and `audio` are ids of the other two tables."""

    id: str
    split: str
    image: str
    audio: str
    text: str
    label: int
    kind: str
    image_digit: int
    audio_digit: int


def pictures(seed: int) -> list[dict]:
    """The 1,797 digits of scikit-learn, 8 x 8 in 17 grey levels, as PNG, split by digit and chance."""
    values, labels = map(np.asarray, load_digits(return_X_y=True))
    if len(np.unique(values, axis=0)) != len(values):
        raise ValueError("two of scikit-learn's pictures are equal: they could fall into two splits")
    split = np.empty(len(labels), dtype=object)
    for digit in range(10):
        rows = np.random.default_rng([seed, digit]).permutation(np.flatnonzero(labels == digit))
        ends = np.round(np.cumsum([PICTURE_SHARE[name] for name in SPLITS]) * len(rows)).astype(int)
        for name, part in zip(SPLITS, np.split(rows, ends[:-1]), strict=True):
            split[part] = name
    return [
        {"id": f"p{i:04d}", "split": split[i], "label": int(label), "image": encode_picture(grey.reshape(8, 8))}
        for i, (grey, label) in enumerate(zip(values, labels, strict=True))
    ]


def encode_picture(values: np.ndarray) -> bytes:
    """PNG bytes of grey values in 0..16."""
    buffer = io.BytesIO()
    Image.fromarray(np.round(values * (255 / 16)).astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def recordings(seed: int) -> Iterator[dict]:
    """Every digit in every voice, `TAKES` times at drawn speed and pitch, as 8 kHz mono FLAC."""
    number = 0
    for split in SPLITS:
        for place, variant in enumerate(VARIANTS[split].split()):
            voice = f"{ACCENTS[place % len(ACCENTS)]}+{variant}"
            for digit, _ in product(range(10), range(TAKES)):
                rng = np.random.default_rng([seed, number])
                speed, pitch = int(rng.integers(130, 211)), int(rng.integers(25, 76))
                yield {
                    "id": f"s{number:04d}",
                    "split": split,
                    "label": digit,
                    "audio": encode_sound(trim(speak(WORDS[digit], voice, speed, pitch))),
                    "voice": voice,
                    "speed": speed,
                    "pitch": pitch,
                }
                number += 1


def speak(word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """Samples at `RATE` Hz of a word said by espeak-ng; `speed` in words a minute, `pitch` in 0..99."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    said = subprocess.run(command, capture_output=True, check=True)
    if said.stderr:  # an unknown variant is a message and the default voice, not a failure
        raise ValueError(f"espeak-ng, voice {voice!r}: {said.stderr.decode().strip()}")
    samples, rate = soundfile.read(io.BytesIO(said.stdout), dtype="float32")
    return resample_poly(samples, RATE, rate)


def trim(samples: np.ndarray, floor: float = 0.02) -> np.ndarray:
    """Without the leading and trailing frames of 10 ms whose level is below `floor` times the loudest."""
    frame = RATE // 100
    level = np.sqrt(np.add.reduceat(samples**2, np.arange(0, len(samples), frame)) / frame)
    loud = np.flatnonzero(level > floor * level.max())
    return samples[loud[0] * frame : (loud[-1] + 1) * frame]


def encode_sound(samples: np.ndarray) -> bytes:
    """FLAC bytes. Eight significant bits of sixteen: a quarter of the size, and every decoder reads 16-bit FLAC."""
    coarse = np.round(samples / np.abs(samples).max() * 127).astype(np.int16) * 256
    buffer = io.BytesIO()
    soundfile.write(buffer, coarse, RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return buffer.getvalue()


def phrasings(kind: str, split: str) -> list[str]:
    """What a question of a kind can be in a split: no test phrasing is in train or val, but every word of it is."""
    made = [
        (i, f"{opening} {adjective} {noun}")
        for i, (opening, (j, adjective), noun) in enumerate(product(OPENINGS, enumerate(ADJECTIVES[kind]), NOUNS))
    ]
    return [text for i, text in made if (i % 5 == 0) == (split == "test")]


def questions(images: Sequence[dict], sounds: Sequence[dict], seed: int) -> Iterator[Question]:
    """Every kind about every pair of digits equally often; each picture and recording of a digit in turn."""
    for place, split in enumerate(SPLITS):
        rng = np.random.default_rng([seed, place])
        cells = [cell for cell in product(KINDS, range(10), range(10)) for _ in range(REPEATS[split])]
        seen, heard = _in_turn(images, split, rng), _in_turn(sounds, split, rng)
        texts = {kind: phrasings(kind, split) for kind in KINDS}
        for number, cell in enumerate(rng.permutation(len(cells))):
            kind, left, right = cells[cell]
            yield Question(
                id=f"{split}-{number:05d}",
                split=split,
                image=next(seen[left]),
                audio=next(heard[right]),
                text=str(rng.choice(texts[kind])),
                label=KINDS[kind](left, right),
                kind=kind,
                image_digit=left,
                audio_digit=right,
            )


def _in_turn(rows: Sequence[dict], split: str, rng: np.random.Generator) -> list[Iterator[str]]:
    """For each digit, an endless round over the ids of the split in a drawn order."""
    ids = [[row["id"] for row in rows if row["split"] == split and row["label"] == digit] for digit in range(10)]
    return [cycle(rng.permutation(each).tolist()) for each in ids]


def ceilings(rows: Sequence[Question]) -> dict[str, float]:
    """Best possible accuracy with each subset of the inputs, were everything recognised: t, i, a, ti, ta, ia, tia.

    Takes, for each value of what the subset shows (kind of question, written digit, spoken digit), the most frequent
    answer of these very rows.
    """
    facts = {"t": "kind", "i": "image_digit", "a": "audio_digit"}
    found = {}
    for size in (1, 2, 3):
        for subset in combinations(facts, size):
            answers: dict[tuple, Counter] = defaultdict(Counter)
            for row in rows:
                answers[tuple(getattr(row, facts[name]) for name in subset)][row.label] += 1
            found["".join(subset)] = sum(max(count.values()) for count in answers.values()) / len(rows)
    return found


def write_readme(path: Path, images: Sequence[dict], sounds: Sequence[dict], asked: Sequence[Question]) -> None:
    """Replace what stands between the two marks of the README by the counts and ceilings of these rows."""
    lines = ["| split | pictures | recordings | voices | questions |", "|---|---|---|---|---|"]
    for split in SPLITS:
        counts = [sum(row["split"] == split for row in rows) for rows in (images, sounds)]
        voices = len({row["voice"] for row in sounds if row["split"] == split})
        lines.append(
            f"| {split} | {counts[0]:,} | {counts[1]:,} | {voices} | {sum(q.split == split for q in asked):,} |"
        )
    best = ceilings([row for row in asked if row.split == "test"])
    lines += ["", "| " + " | ".join(best) + " |", "|---" * len(best) + "|"]
    lines += ["| " + " | ".join(f"{100 * value:.1f}" for value in best.values()) + " |"]
    marks = re.compile(r"(?<=<!-- figures -->\n).*(?=\n<!-- end -->)", re.DOTALL)
    text, found = marks.subn("\n".join(lines), path.read_text())
    if found != 1:
        raise ValueError(f"{path}: {found} places for the figures, not 1: keep the two marks in the README")
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded digits data set.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    images, sounds = pictures(args.seed), list(recordings(args.seed))
    asked = list(questions(images, sounds, args.seed))
    for name, rows in (("pictures", images), ("speech", sounds)):
        pq.write_table(pa.Table.from_pylist(rows), args.out / f"{name}.parquet", compression="zstd")
    with (args.out / "questions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(asked[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in asked)
    write_readme(args.out / "README.md", images, sounds, asked)


if __name__ == "__main__":
    main()
