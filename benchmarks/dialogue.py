"""How often a trained dialogue is right, by kind of question, and what it knows without the turns before.

    uv run python data/dialogue/prepare.py ../shared/data
    uv run python train.py experiment=dialogue hydra.run.dir=runs/dialogue
    uv run python -m benchmarks.dialogue runs/dialogue

Every test conversation is held from its first turn on: the model writes each answer, and reads its own answers in the
turns behind. Beside it stand the same model asked each question alone, with the media but without what was said
before, the commonest training answer to a kind of question, and chance, one in as many as there are answers of a kind.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import mmformer
from mmformer.datasets.chat import Conversation, Turn

FOLDER = Path(__file__).resolve().parents[1] / "data" / "dialogue"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=2000, help="conversations of the test")
    parser.add_argument("--batch", type=int, default=200)
    options = parser.parse_args()
    model = mmformer.load(options.run)
    rows = [json.loads(line) for line in (FOLDER / "conversations.jsonl").read_text().splitlines()]
    test = [row for row in rows if row["split"] == "test"][: options.count]
    media = Media()
    right, alone = Counter(), Counter()
    for start in range(0, len(test), options.batch):
        part = test[start : start + options.batch]
        right.update(held(model, part, media))
        alone.update(single(model, part, media))
    show(right, alone, answers(rows, "train"), answers(test, "test"))


class Media:
    """The pictures and sounds of the conversations."""

    def __init__(self) -> None:
        self.files = {}
        for kind, column in (("pictures", "image"), ("sounds", "audio")):
            table = pq.read_table(FOLDER / f"{kind}.parquet")
            self.files[column] = dict(zip(table["id"].to_pylist(), table[column].to_pylist(), strict=True))

    def of(self, row: dict[str, Any]) -> dict[str, list[bytes]]:
        return {name: [files[i] for i in row.get(f"{name}s", ())] for name, files in self.files.items()}


def held(model: Any, rows: Sequence[dict[str, Any]], media: Media) -> Iterator[str]:
    """The kinds of the answers that are right, each conversation with the model's own answers in it."""
    said: list[list[Turn]] = [[] for _ in rows]
    for place in range(0, max(len(row["turns"]) for row in rows), 2):
        going = [i for i, row in enumerate(rows) if place < len(row["turns"])]
        for i in going:
            said[i].append(Turn(role="user", text=rows[i]["turns"][place]["text"]))
        talks = [Conversation(turns=tuple(said[i]), media=media.of(rows[i])) for i in going]
        for i, answer in zip(going, model.reply(talks, max_length=6), strict=True):
            said[i].append(Turn(role="assistant", text=answer))
            wanted = rows[i]["turns"][place + 1]
            if answer == wanted["text"]:
                yield wanted["kind"]


def single(model: Any, rows: Sequence[dict[str, Any]], media: Media) -> Iterator[str]:
    """The same for every question as if it were the first."""
    talks, wanted = [], []
    for row in rows:
        front = " ".join(["<image>"] * len(row.get("images", ())) + ["<audio>"] * len(row.get("audios", ())))
        for question, answer in zip(row["turns"][::2], row["turns"][1::2], strict=True):
            text = question["text"] if question["text"].startswith("<") else f"{front} {question['text']}"
            talks.append(Conversation(turns=(Turn(role="user", text=text),), media=media.of(row)))
            wanted.append(answer)
    for answer, right in zip(model.reply(talks, max_length=6), wanted, strict=True):
        if answer == right["text"]:
            yield right["kind"]


def answers(rows: Sequence[dict[str, Any]], split: str) -> dict[tuple[bool, str], Counter[str]]:
    """How often each answer is given, by whether the question leans on what was said before, and by its kind."""
    found: dict[tuple[bool, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        for turn in row["turns"][1::2] if row["split"] == split else ():
            found[turn["history"], turn["kind"]][turn["text"]] += 1
    return found


def show(
    right: Counter[str],
    alone: Counter[str],
    known: dict[tuple[bool, str], Counter[str]],
    asked: dict[tuple[bool, str], Counter[str]],
) -> None:
    """A line for each kind, and one for each sort of question."""
    print(f"{'':<24} {'asked':>7} {'right':>7} {'alone':>7} {'commonest':>10} {'chance':>7}")
    for history in (False, True):
        kinds = sorted(kind for leans, kind in asked if leans == history)
        lines = [line(kind, right, alone, known[history, kind], asked[history, kind]) for kind in kinds]
        for kind, cells in zip(kinds, lines, strict=True):
            print(f"  {kind:<22} " + shares(cells))
        total = [sum(cells[i] for cells in lines) for i in range(5)]
        print(f"{'leaning on earlier turns' if history else 'of the media alone':<24} " + shares(total))


def line(kind: str, right: Counter[str], alone: Counter[str], known: Counter[str], asked: Counter[str]) -> list[float]:
    """How many were asked, and how many are right: of the conversation, alone, by the commonest, by chance."""
    count, commonest = asked.total(), known.most_common(1)[0][0]
    return [count, right[kind], alone[kind], asked[commonest], count / len(known)]


def shares(cells: Sequence[float]) -> str:
    count = cells[0]
    right, alone, commonest, chance = (100 * cell / count for cell in cells[1:])
    return f"{count:>7.0f} {right:>7.1f} {alone:>7.1f} {commonest:>10.1f} {chance:>7.1f}"


if __name__ == "__main__":
    main()
