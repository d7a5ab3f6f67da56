"""Next tokens, hidden parts and alignments: two processes train as one does on the same samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Generator, nn

from mmformer.batch import Ragged
from mmformer.encoders import Encoder, MaskVector, mel_patches
from mmformer.heads import Head, VocabularyHead
from mmformer.model import Model
from mmformer.objectives import CTC, DistilledWords, Masked, Matching, Momentum, NextToken, Objective, Pixels, Words
from mmformer.objectives.masked import Riddle
from tests.helpers import random_batch, scramble, small_model
from tests.objectives.alignment import cross_model
from tests.objectives.test_language import END, START, dialogue
from tests.objectives.test_language import model as language_model
from tests.processes import both
from tests.training.ranked import Case, assert_equal, share

APART = random_batch(10, 3, subsets=[("text", "image"), ("image", "audio")])
SHARES = {"disjoint modalities": ([0, 2, 4, 6, 8], [1, 3, 5]), "uneven": ([0, 1], [2, 3, 4, 5, 6, 7])}


class Even(Words):
    """Hides the words of an even number: what is drawn at random would differ between the processes."""

    def hide(self, encoder: nn.Module, items: Ragged, generator: Generator | None) -> Riddle:
        cells = (items.values % 2 == 0).nonzero()[:, 0]
        shown = torch.where(items.values % 2 == 0, self.mask, items.values)
        counts = [shape[0] for shape in items.shapes]
        return Riddle(items=replace(items, values=shown), cells=cells, answer=items.values[cells], counts=counts)


@dataclass(frozen=True)
class First:
    """The first row of patches."""

    def __call__(self, rows: int, columns: int, generator: Generator | None) -> torch.Tensor:
        hidden = torch.zeros(rows, columns, dtype=torch.bool)
        hidden[0, : rows * columns - 1] = True
        return hidden


class Stranger(Momentum):
    """A teacher that says other things than the model."""

    def prepare(self, model: Model) -> None:
        super().prepare(model)
        assert self.model is not None
        scramble(self.model, seed=5)


def guessing() -> Model:
    net = small_model()
    net.encoders["image"].embedder.mask = MaskVector(24)  # pyright: ignore
    net.heads.update({"words": VocabularyHead(24, 50), "pixels": Head(24, 48), "match": Head(24, 2)})
    scramble(net)
    return net


def speech() -> Model:
    model = Model({"audio": Encoder(mel_patches(16, 5, 4))}, heads={"letters": VocabularyHead(16, 50)})
    scramble(model)
    return model


def kinds() -> dict[str, tuple[Model, dict[str, Objective], Any]]:
    puzzles = {"text": Even("words", 49, 50, (0, 1)), "image": Pixels("pixels", First())}
    beside = {"match": Matching(["text", "image"], "match", None, 0)}
    talk = dialogue(8)
    spoken = random_batch(10, 5, subsets=[("text", "audio"), ("audio",)])
    return {
        "next": (language_model(), {"next": NextToken("words", smoothing=0.1)}, talk),
        "answers": (language_model(), {"next": NextToken("words", start=START, end=END)}, talk),
        "masked": (guessing(), {"one": Masked({"text": puzzles["text"]}), "two": Masked(puzzles)}, APART),
        "masked beside": (
            guessing(),
            {"one": Masked({"text": puzzles["text"]}, needs=["image"], beside=beside)},
            APART,
        ),
        "distilled": (
            cross_model(),
            {
                "momentum": Stranger(0.9, 0.4, 0),
                "words": DistilledWords(Even("vocabulary", 49, 50, (0, 1)), ["text", "image"]),
            },
            APART,
        ),
        "letters": (speech(), {"ctc": CTC("letters", blank=49)}, spoken),
    }


def cases() -> dict[str, Case]:
    out = {}
    for cut, rows in SHARES.items():
        for kind, (model, objectives, batch) in kinds().items():
            used = sorted([*rows[0], *rows[1]])
            kept = [row for row in used if row < len(batch)]
            place = {row: new for new, row in enumerate(kept)}
            mine, yours = ([place[row] for row in part if row in place] for part in rows)
            out[f"{kind}: {cut}"] = Case(model, objectives, batch.select(kept), (mine, yours), {})
    return out


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return both(share, tmp_path_factory.mktemp("language"), cases)


@pytest.mark.parametrize("name", list(cases()))
def test_two_processes_take_the_step_of_one(found: list[dict[str, Any]], name: str) -> None:
    assert_equal(cases()[name], [part[name] for part in found])
