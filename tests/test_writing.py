"""What a trained model says to people: prompts as in training, turns about pictures, and the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

import mmformer
from mmformer.checkpoints import build, save_model
from mmformer.cli import main
from mmformer.datasets.chat import Conversation, Marks, Turn, chat_batch
from mmformer.datasets.tokenizers import BOS, EOS, SPECIALS, ByteTokenizer
from mmformer.generation import Limits, Sampling, generate
from mmformer.predict import Predictor
from tests.checkpoints.configs import FEATURES, model_config
from tests.helpers import scramble
from tests.report.runs import picture_file

MARKS = Marks.behind(ByteTokenizer().vocab_size)
LENGTH = 8
BANNED = tuple(sorted({*range(len(SPECIALS)), MARKS.user, MARKS.assistant}))


def config(objective: dict, **facts) -> dict:
    """A model that writes about pictures, sounds and texts."""
    made = model_config()
    fusion = made["fusion"]
    fusion |= {"stream": ["image", "audio", "text"], "num_latents": 0, "sequential": True}
    causal = {"_target_": "mmformer.visibility.Visibility", "causal": True}
    fusion["transformer"] = {**fusion["transformer"], "visibility": causal}
    fusion["pool"] = {"_target_": "mmformer.pooling.MeanPool"}
    made["heads"] = {"vocabulary": {"_target_": "mmformer.heads.VocabularyHead", "dim": 24, "vocab_size": 300}}
    text = {**FEATURES["text"], "begin": True, "end": True, "max_length": 99}
    return {
        "model": made,
        "objectives": {"say": objective},
        "facts": {"targets": {}, **facts},
        "features": FEATURES | {"text": text},
    }


def predictor(folder: Path, objective: dict, **facts) -> Predictor:
    held = config(objective, **facts)
    model = scramble(build(held["model"]))
    objectives = {name: build(part) for name, part in held["objectives"].items()}
    save_model(folder / "model", model, held, ByteTokenizer(), objectives)
    return mmformer.load(folder)


def words(**options) -> dict:
    return {"_target_": "mmformer.objectives.NextToken", "head": "vocabulary", **options}


def ids_of(text: str) -> list[int]:
    return ByteTokenizer().encode(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    (folder / "a.png").write_bytes(picture_file(1, (12, 16)))
    predictor(folder, words(start=MARKS.assistant, end=MARKS.end), chat=vars_of(MARKS))
    return folder


def vars_of(marks: Marks) -> dict[str, int]:
    return {"user": marks.user, "assistant": marks.assistant, "end": marks.end}


def by_hand(found: Predictor, prompts: list[list[int]], limits: Limits, batch) -> list[str]:
    """What is written behind these ids."""
    batch.inputs["text"] = mmformer.batch.Ragged.stack([torch.tensor(ids) for ids in prompts], range(len(prompts)))
    return [ByteTokenizer().decode(texts[0].ids) for texts in generate(found.model, batch, limits)]


def test_a_prompt_is_the_text_without_its_end_or_the_beginning_of_one(tmp_path, place):
    found = predictor(tmp_path, words())
    samples = [{"text": "what?", "image": str(place / "a.png")}, {"image": str(place / "a.png")}, {"text": "oh"}]
    ((_, batch),) = found._batches(samples, strict=True)
    prompts = [[BOS, *ids_of("what?")], [BOS], [BOS, *ids_of("oh")]]
    limits = Limits(max_length=LENGTH, stop=(EOS,), banned=tuple(i for i in range(len(SPECIALS)) if i != EOS))
    expected = by_hand(found, prompts, limits, batch)
    assert found.generate(samples, LENGTH) == expected
    assert found.generate(samples[1], LENGTH) == expected[1]
    several = found.generate(samples, LENGTH, Sampling(count=2, temperature=3.0, seed=1))
    assert [len(set(texts)) for texts in several] == [2, 2, 2]


def test_a_prompt_ends_where_the_model_was_trained_to_go_on(tmp_path):
    starting = {"_target_": "mmformer.objectives.StartingWith", "first": 280, "objective": words(start=281, end=282)}
    found = predictor(tmp_path, starting)
    ((_, batch),) = found._batches([{"text": "what?"}], strict=True)
    limits = Limits(max_length=LENGTH, stop=(282,), banned=tuple(range(len(SPECIALS))))
    expected = by_hand(found, [[280, *ids_of("what?"), 281]], limits, batch)
    assert found.generate([{"text": "what?"}], LENGTH) == expected


def test_turns_are_answered_as_the_conversation_was_trained(place):
    found = mmformer.load(place)
    assert found.marks == MARKS
    said, media = ["<image> what is it?", "a cat", "which colour?"], {"image": [place / "a.png"]}
    turns = tuple(Turn(role=role, text=text) for role, text in zip(("user", "assistant", "user"), said, strict=True))
    batch = chat_batch([Conversation(turns=turns, media={"image": [str(place / "a.png")]})], found.features, MARKS)
    limits = Limits(max_length=LENGTH, stop=(MARKS.end,), banned=BANNED)
    (expected,) = generate(found.model, batch, limits)[0]
    assert found.chat(said, media, LENGTH) == ByteTokenizer().decode(expected.ids)
    assert found.chat(turns, media, LENGTH) == found.chat(said, media, LENGTH)
    assert found.chat(said[-1:], None, LENGTH) != found.chat(said, media, LENGTH)


def test_a_conversation_on_the_command_line(place, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n\nwhich colour?\n"))
    with pytest.raises(SystemExit, match="0"):
        main(["chat", str(place), "--image", str(place / "a.png"), "--json", "--max-length", str(LENGTH)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["user"] for row in rows] == ["<image> what is it?", "which colour?"]
    found, media = mmformer.load(place), {"image": [place / "a.png"]}
    first = found.chat(["<image> what is it?"], media, LENGTH)
    assert rows[0]["assistant"] == first
    assert rows[1]["assistant"] == found.chat(["<image> what is it?", first, "which colour?"], media, LENGTH)


def test_what_cannot_be_written_is_an_error_that_says_why(tmp_path, place):
    found = mmformer.load(place)
    with pytest.raises(ValueError, match="2 turns, of which the last is not the user's"):
        found.chat(["a", "b"])
    with pytest.raises(ValueError, match="1 <image> in its turns, but 0 in its images"):
        found.chat(["<image>?"])
    with pytest.raises(ValueError, match="more than max_length 99"):
        found.chat(["a" * 100])
    found.marks = None
    with pytest.raises(ValueError, match="not trained on conversations: use generate"):
        found.chat(["a"])
    classes = {"_target_": "mmformer.objectives.Classes", "head": "vocabulary", "target": "label"}
    with pytest.raises(ValueError, match="trained for say, which writes no texts"):
        predictor(tmp_path, classes).generate({"text": "a"})
