"""The questions of easyvqa.zip with what they say of each picture beside them: its shape and its colour.

    uv run python data/easyvqa/prepare.py ../shared/data/easyvqa.zip

Writes questions.csv, conversations.jsonl, pictures.parquet and speech.parquet here. A picture's shape and colour come
from the answers to its own questions; pictures of the test stay without, so that nothing but the official answers is
ever judged.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from zipfile import ZipFile

import pyarrow as pa
import pyarrow.parquet as pq

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
COLUMNS = ("id", "split", "image", "audio", "text", "label", "shape", "colour")


def main(archive: Path) -> None:
    folder = Path(__file__).parent
    with ZipFile(archive) as file:
        rows = list(csv.DictReader(io.StringIO(file.read("manifest.csv").decode())))
        for name, column in (("pictures", "image"), ("speech", "audio")):
            copy(file, sorted({row[column] for row in rows}), column, folder / f"{name}.parquet")
    known: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["split"] != "test":
            known.setdefault(row["image"], {}).update(said(row["text"], row["label"]))
    with (folder / "questions.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: row[name] for name in COLUMNS[:6]} | known.get(row["image"], {}))
    with (folder / "conversations.jsonl").open("w") as out:
        out.writelines(json.dumps(conversation(row)) + "\n" for row in rows)
    print(f"{folder}: {len(rows):,} questions about {len({row['image'] for row in rows}):,} pictures")


def conversation(row: dict[str, str]) -> dict[str, object]:
    """A question and its answer as turns about a picture."""
    asked, said = {"role": "user", "text": f"<image> {row['text']}"}, {"role": "assistant", "text": row["label"]}
    return {"id": row["id"], "split": row["split"], "images": [row["image"]], "turns": [asked, said]}


def copy(archive: ZipFile, names: list[str], column: str, target: Path) -> None:
    """Files of an archive as a table, each under its name there."""
    pq.write_table(pa.table({"id": names, column: [archive.read(name) for name in names]}), target)


def said(question: str, answer: str) -> dict[str, str]:
    """What a question and its answer say of the picture; {} where they only say what it is not."""
    words = set(re.findall(r"[a-z]+", question))
    negated = bool(words & {"not", "no"})
    holds = answer not in ("yes", "no") or (answer == "yes") != negated
    found = {answer, *words} if holds else set()
    pairs = {"shape": found & set(SHAPES), "colour": found & set(COLOURS)}
    return {name: values.pop() for name, values in pairs.items() if len(values) == 1}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
