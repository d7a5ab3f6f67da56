"""Make conversations about pictures and sounds, in which later turns only make sense beside earlier ones.

    uv run python data/dialogue/prepare.py ../shared/data

Writes conversations.jsonl, pictures.parquet and sounds.parquet here. A conversation is about one picture of easy-VQA
(what shape, what colour), about a handwritten or a spoken digit, or about both (MNIST and FSDD). Every turn of the
assistant says under `kind` what was asked, and under `history` whether its question can be answered from the media
alone: "and the other one?" cannot.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@dataclass
class Talk:
    """A conversation that is being made: what was said, and what later questions may refer to."""

    facts: dict[str, str]
    media: str
    turns: list[dict[str, Any]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)

    def ask(self, question: str, answer: str, kind: str, topic: str, history: bool = True) -> None:
        """One question and its answer; the media stand in front of the first."""
        text = question if self.turns else f"{self.media} {question}"
        self.turns.append({"role": "user", "text": text})
        self.turns.append({"role": "assistant", "text": answer, "kind": kind, "history": history})
        self.answers.append(answer)
        self.topics.append(topic)

    def other(self) -> str:
        """The fact that was not asked for last."""
        return next(name for name in self.facts if name != self.topics[-1])


FIRST = {
    "shape": ("what shape is it?", "which shape do you see?", "name the shape."),
    "colour": ("what colour is it?", "which colour do you see?", "name the colour."),
    "picture": ("which digit is written?", "read the picture.", "what does the picture show?"),
    "sound": ("which digit is spoken?", "listen to the sound.", "what does the voice say?"),
}
OTHER = ("and the other one?", "now the other.", "what about the other one?")
AGAIN = ("what did you say first?", "repeat your first answer.", "what was your first answer?")
ASKED = ("what did i ask first?", "which thing did i ask about first?")
PLUS = ("add one to that.", "what comes after that?", "one more than your last answer?")
LARGER = ("which of your last two answers is larger?", "the larger of the last two?")
EVEN = ("is that even?", "is your last answer an even number?")
NAMED = {"shape": "shape", "colour": "colour", "picture": "the picture", "sound": "the sound"}


def first(talk: Talk, dice: random.Random) -> None:
    topic = dice.choice(list(talk.facts))
    talk.ask(dice.choice(FIRST[topic]), talk.facts[topic], topic, topic, history=False)


def other(talk: Talk, dice: random.Random) -> None:
    topic = talk.other()
    talk.ask(dice.choice(OTHER), talk.facts[topic], "other", topic)


def again(talk: Talk, dice: random.Random) -> None:
    talk.ask(dice.choice(AGAIN), talk.answers[0], "again", talk.topics[0])


def asked(talk: Talk, dice: random.Random) -> None:
    talk.ask(dice.choice(ASKED), NAMED[talk.topics[0]], "asked", talk.topics[-1])


def plus(talk: Talk, dice: random.Random) -> None:
    talk.ask(dice.choice(PLUS), str(int(talk.answers[-1]) + 1), "plus", talk.topics[-1])


def larger(talk: Talk, dice: random.Random) -> None:
    talk.ask(dice.choice(LARGER), str(max(map(int, talk.answers[-2:]))), "larger", talk.topics[-1])


def even(talk: Talk, dice: random.Random) -> None:
    talk.ask(dice.choice(EVEN), "no" if int(talk.answers[-1]) % 2 else "yes", "even", talk.topics[-1])


def guess(talk: Talk, dice: random.Random) -> None:
    """ "And red?": whether the colour, or the shape, is another than was just named."""
    topic = talk.topics[-1]
    fact = talk.facts[topic]
    wrong = dice.choice([word for word in (SHAPES if topic == "shape" else COLOURS) if word != fact])
    word = dice.choice((fact, wrong))
    talk.ask(f"so it is not {word}?", "no" if word == fact else "yes", "guess", topic, history=False)


Turn = Callable[[Talk, random.Random], None]


def pictures(talk: Talk, dice: random.Random) -> None:
    """Of a shape and its colour, in three to five turns."""
    first(talk, dice)
    other(talk, dice)
    for turn in dice.sample((again, asked, other, guess), dice.randint(1, 3)):
        turn(talk, dice)
        if talk.answers[-1] not in talk.facts.values():  # a question about the question ends the talk of the facts
            break


def digits(talk: Talk, dice: random.Random) -> None:
    """Of a written and a spoken digit, in three to five turns, of which some are sums."""
    first(talk, dice)
    numbers: tuple[Turn, ...] = (other, plus)
    dice.choice(numbers)(talk, dice)
    for turn in dice.sample((other, plus, larger, again), dice.randint(1, 2)):
        turn(talk, dice)
    dice.choice((even, asked, larger, again))(talk, dice)


def digit(talk: Talk, dice: random.Random) -> None:
    """Of a written or a spoken digit alone, in two to four turns."""
    first(talk, dice)
    if dice.random() < 0.5:
        plus(talk, dice)
    for turn in dice.sample((again, even, asked), dice.randint(1, 2)):
        turn(talk, dice)
        if not talk.answers[-1].isdigit():
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with easyvqa.zip and avdigits/")
    parser.add_argument("--train", type=int, default=20000, help="conversations to train on; a tenth each to judge")
    options = parser.parse_args()
    seen, heard = {}, {}
    rows = []
    for split, count in (("train", options.train), ("val", options.train // 10), ("test", options.train // 10)):
        dice = random.Random(split)
        shapes = list(shapes_of(options.source / "easyvqa.zip", split, seen))
        written, spoken = digits_of(options.source / "avdigits", split, seen, heard)
        for number in range(count):
            if number % 3 == 0:
                name, facts = dice.choice(shapes)
                talk, media = Talk(facts, "<image>"), {"images": [name]}
                pictures(talk, dice)
            else:
                (name, picture), (clip, sound) = dice.choice(written), dice.choice(spoken)
                facts, media = {"picture": picture, "sound": sound}, {"images": [name], "audios": [clip]}
                if number % 3 == 1:
                    lacks = dice.choice(list(facts))
                    facts.pop(lacks)
                    media.pop({"picture": "images", "sound": "audios"}[lacks])
                talk = Talk(facts, " ".join(f"<{kind.removesuffix('s')}>" for kind in media))
                (digits if len(facts) == 2 else digit)(talk, dice)
            rows.append({"id": f"{split}-{number:05}", "split": split, **media, "turns": talk.turns})
    used = {name for row in rows for key in ("images", "audios") for name in row.get(key, ())}
    write(HERE / "pictures.parquet", "image", seen, used)
    write(HERE / "sounds.parquet", "audio", heard, used)
    (HERE / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [turn for row in rows for turn in row["turns"] if turn.get("history")]
    print(f"{HERE.name}: {len(rows):,} conversations, {len(turns):,} answers that depend on what was said before")


def shapes_of(path: Path, split: str, seen: dict[str, bytes]) -> Iterator[tuple[str, dict[str, str]]]:
    """The pictures of easy-VQA whose shape and colour its own questions give away."""
    with ZipFile(path) as archive:
        known: dict[str, dict[str, str]] = {}
        for row in csv.DictReader(io.StringIO(archive.read("manifest.csv").decode())):
            if row["split"] == split:
                known.setdefault(row["image"], {}).update(said(row["text"], row["label"]))
        for name, facts in known.items():
            if len(facts) == 2:
                seen[name] = archive.read(name)
                yield name, facts


def said(question: str, answer: str) -> dict[str, str]:
    """What a question and its answer say of the picture; {} where they only say what it is not."""
    words = set(re.findall(r"[a-z]+", question))
    negated = bool(words & {"not", "no"})
    holds = answer not in ("yes", "no") or (answer == "yes") != negated
    found = {answer, *words} if holds else set()
    pairs = {"shape": found & set(SHAPES), "colour": found & set(COLOURS)}
    return {name: values.pop() for name, values in pairs.items() if len(values) == 1}


def digits_of(
    folder: Path, split: str, seen: dict[str, bytes], heard: dict[str, bytes]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pictures and recordings of a split by name, with the digit each is of."""
    table = pq.read_table(folder / "mnist.parquet", columns=["id", "split", "label", "image"]).to_pylist()
    mine = [row for row in table if row["split"] == split]
    seen |= {row["id"]: row["image"] for row in mine}
    with ZipFile(folder / "fsdd.zip") as archive:
        clips = [
            row for row in csv.DictReader(io.StringIO(archive.read("manifest.csv").decode())) if row["split"] == split
        ]
        heard |= {row["id"]: archive.read(row["audio"]) for row in clips}
    return [(row["id"], str(row["label"])) for row in mine], [(row["id"], row["label"]) for row in clips]


def write(path: Path, column: str, files: dict[str, bytes], used: set[str]) -> None:
    kept = sorted(used & files.keys())
    pq.write_table(pa.table({"id": kept, column: [files[name] for name in kept]}), path)


if __name__ == "__main__":
    main()
