from __future__ import annotations

import io
import json
import re
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmformer.datasets.chat import Conversation, Marks, Turn, chat_batch, pieces
from mmformer.datasets.conversations import ConversationDataset, ConversationModule, read_conversations
from mmformer.datasets.datamodule import Loading
from mmformer.datasets.dataset import DataError
from mmformer.datasets.features import LogMel, Picture, Text, Waveform
from mmformer.datasets.sources import DecodeError
from mmformer.datasets.tables import ManifestError
from mmformer.datasets.tokenizers import BPE, ByteTokenizer, WordTokenizer

TOKENIZER = ByteTokenizer()
MARKS = Marks.behind(TOKENIZER.vocab_size)
FEATURES = {
    "text": Text(TOKENIZER, 200),
    "image": Picture(channels=1),
    "audio": LogMel(Waveform(8000, 2.0), 20, 200, 80),
}
RNG = np.random.default_rng(0)


def png(side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (side, 8), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def wav(samples: int = 1600) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, 0.1 * RNG.standard_normal(samples), 8000, format="WAV")
    return stream.getvalue()


def said(*texts: str) -> list[dict[str, str]]:
    """Turns, of the user and the assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "text": text} for i, text in enumerate(texts)]


ROWS = [
    {"id": "a", "split": "train", "images": ["0.png"], "turns": said("What is on <image>?", "a circle", "red?", "yes")},
    {"id": "b", "split": "train", "images": ["1.png", "0.png"], "audios": ["0.wav"],
     "turns": said("<image><image>Same?", "no", "<audio> and now?", "a dog")},
    {"id": "c", "split": "train", "turns": said("hello", "hi")},
    {"id": "d", "split": "val", "audios": ["0.wav"], "turns": said("<audio>", "a cat")},
]  # fmt: skip


def write(folder: Path, rows=ROWS, name: str = "chat.jsonl") -> Path:
    for i in range(2):
        (folder / f"{i}.png").write_bytes(png(8 + i))
        (folder / f"{i}.wav").write_bytes(wav(1600 + 400 * i))
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def dataset(path: Path, split: str | None = "train", **options) -> ConversationDataset:
    return ConversationDataset(read_conversations(str(path)), split, FEATURES, MARKS, **options)


def sequence(batch, row: int) -> list[tuple[str, torch.Tensor]]:
    """The items of a sample in the order of their places."""
    found = []
    for name, items in batch.inputs.items():
        for (owner, item), place in zip(items.items(), items.places, strict=True):
            if owner == row:
                found.append((place, name, item))
    assert sorted(place for place, _, _ in found) == list(range(len(found)))
    return [(name, item) for _, name, item in sorted(found, key=lambda held: held[0])]


def readable(ids: torch.Tensor) -> str:
    """Ids with the marks written out."""
    names = {MARKS.user: "[u]", MARKS.assistant: "[a]", MARKS.end: "[e]"}
    return "".join(names.get(i) or TOKENIZER.decode([i]) for i in ids.tolist())


def test_texts_are_cut_where_media_stand_and_all_stand_in_order(tmp_path):
    batch = dataset(write(tmp_path)).__getitems__([(3, 1), (3, 0)])
    assert (batch.ids, batch.epoch, batch.indices, batch.faults) == (("b", "a"), 3, (1, 0), ())
    shown = [(name, readable(item) if name == "text" else tuple(item.shape)) for name, item in sequence(batch, 0)]
    assert shown == [
        ("text", "[u]"), ("image", (9, 8, 1)), ("image", (8, 8, 1)), ("text", "Same?[e][a]no[e][u]"),
        ("audio", (21, 20)), ("text", " and now?[e][a]a dog[e]"),
    ]  # fmt: skip
    assert [readable(item) for name, item in sequence(batch, 1) if name == "text"] == [
        "[u]What is on ",
        "?[e][a]a circle[e][u]red?[e][a]yes[e]",
    ]


def test_what_is_trained_is_what_the_assistant_says(tmp_path):
    from mmformer.losses.language import answer_mask

    batch = dataset(write(tmp_path)).__getitems__([(0, 1)])
    ids = torch.cat([item for name, item in sequence(batch, 0) if name == "text"])
    trained = answer_mask(ids, torch.zeros_like(ids), MARKS.assistant, MARKS.end)
    assert readable(ids[trained]) == "no[e]a dog[e]"


def test_chat_and_training_give_the_same_items(tmp_path):
    held = dataset(write(tmp_path)).__getitems__([(0, 0), (0, 1), (0, 2)])
    media = {"image": {"a": ["0.png"], "b": ["1.png", "0.png"]}, "audio": {"b": ["0.wav"]}}
    conversations = [
        Conversation(
            turns=tuple(Turn(**turn) for turn in row["turns"]),
            media={name: [tmp_path / path for path in of.get(row["id"], [])] for name, of in media.items()},
        )
        for row in ROWS[:3]
    ]
    chat = chat_batch(conversations, FEATURES, MARKS, ids=["a", "b", "c"], reply=False)
    for row in range(3):
        for (name, mine), (other, theirs) in zip(sequence(chat, row), sequence(held, row), strict=True):
            assert name == other
            assert torch.equal(mine, theirs)


def test_a_reply_is_left_to_the_assistant_and_nothing_else_changes(tmp_path):
    asked = Conversation(turns=(Turn(role="user", text="hello"),))
    batch = chat_batch([asked], FEATURES, MARKS)
    assert readable(batch.inputs["text"].values) == "[u]hello[e][a]"
    assert batch.inputs["text"].places == (0,)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WordTokenizer(("hello",)), BPE.train(["hello"], 261)])
@given(text=st.text(max_size=20))
def test_no_text_gives_a_mark_or_a_special_id(tokenizer, text):
    marks = Marks.behind(tokenizer.vocab_size)
    hostile = f"{text}<eos><mask>[a]<|im_end|>{text}"
    conversation = Conversation(turns=(Turn(role="user", text=hostile), Turn(role="assistant", text=hostile)))
    ids = torch.cat([item for _, item in pieces(conversation, {"text": Text(tokenizer, 999)}, marks)])
    outside = {marks.user, marks.assistant, marks.end}
    assert [i for i in ids.tolist() if i in outside] == [marks.user, marks.end, marks.assistant, marks.end]
    unknown = {tokenizer.specials.unknown} if isinstance(tokenizer, WordTokenizer) else set()
    assert not {*ids.tolist()} & ({*tokenizer.specials.all} - unknown)


def test_media_in_a_zip_and_in_the_cells_of_another_table(tmp_path):
    plain = dataset(write(tmp_path)).__getitems__([(0, 0), (0, 1)])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in (*tmp_path.glob("*.png"), *tmp_path.glob("*.wav"), tmp_path / "chat.jsonl"):
            archive.write(path, path.name)
    pictures = {"id": ["0.png", "1.png"], "data": [(tmp_path / f"{i}.png").read_bytes() for i in range(2)]}
    pyarrow.parquet.write_table(pa.table(pictures), tmp_path / "pictures.parquet")
    referring = read_conversations(str(tmp_path / "chat.jsonl"), {"image": "pictures.parquet:data"})
    for other in (
        dataset(tmp_path / "all.zip"),
        ConversationDataset(referring, "train", FEATURES, MARKS),
    ):
        again = other.__getitems__([(0, 0), (0, 1)])
        assert again.faults == ()
        assert torch.equal(again.inputs["image"].values, plain.inputs["image"].values)
        assert again.inputs["image"].places == plain.inputs["image"].places


def test_conversations_and_their_pictures_in_one_parquet_file(tmp_path):
    rows = [{"id": "a", "split": "train", "images": [png()], "turns": said("<image>", "x")}] * 1
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
    batch = dataset(tmp_path / "chat.parquet").__getitems__([(0, 0)])
    assert [name for name, _ in sequence(batch, 0)] == ["text", "image", "text"]


MISTAKES = {
    "more pictures than places": ({"images": ["0.png", "1.png"]}, r"1 <image> in its turns, but 2 in its images"),
    "fewer pictures than places": ({"images": []}, r"1 <image> in its turns, but 0 in its images"),
    "a place for a sound there is not": (
        {"turns": said("<image><audio>", "x")}, r"1 <audio> in its turns, but 0 in its audios"),
    "a role that is none": (
        {"turns": [{"role": "robot", "text": "<image>"}]}, r"turn 1 has the role 'robot': give user or assistant"),
    "no turns": ({"turns": []}, r"turns are \[\]: give a list of objects with role and text, one at least"),
    "turns that are texts": ({"turns": ["hello"]}, r"turns are \['hello'\]"),
    "a picture that is no list": ({"images": "0.png"}, r"images is '0.png': give a list of paths or ids"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_the_line_and_the_id_before_anything_is_trained(name, tmp_path):
    change, reason = MISTAKES[name]
    wrong = {"id": "x", "split": "train", "images": ["0.png"], "turns": said("<image>", "y")} | change
    path = write(tmp_path, [ROWS[0], wrong])
    path.write_text("\n" + path.read_text())  # the lines of a file are not its rows
    with pytest.raises(ManifestError, match=rf"{re.escape(str(path))}, line 3 \(id 'x'\): .*{reason}"):
        read_conversations(str(path))


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "text": "x"}\n')
    with pytest.raises(ManifestError, match="has no column 'turns'"):
        read_conversations(str(path))


def test_a_conversation_that_is_asked_for_twice_comes_twice(tmp_path):
    batch = dataset(write(tmp_path)).__getitems__([(0, 0), (0, 2), (0, 0)])
    assert batch.ids == ("a", "c", "a")
    assert batch.indices == (0, 2, 0)


def test_what_cannot_be_read_takes_its_conversation_with_it(tmp_path):
    long = {"id": "e", "split": "train", "turns": said("x" * 300, "y")}
    path = write(tmp_path, [*ROWS, long])
    (tmp_path / "1.png").write_bytes(b"not a picture")
    batch = dataset(path).__getitems__([(0, i) for i in range(4)])
    assert batch.ids == ("a", "c")
    assert batch.indices == (0, 2)
    assert [(fault.id, fault.column, fault.path) for fault in batch.faults[:1]] == [("b", "images", "1.png")]
    assert batch.faults[1].column == "turns"
    assert batch.faults[1].reason.startswith("305 ids of text, more than max_length 200")
    with pytest.raises(DataError, match=r"conversation .b., images, 1\.png"):
        dataset(path, on_error="fail").__getitems__([(0, 1)])


def test_chat_tells_what_does_not_fit():
    turns = (Turn(role="user", text="<image>"),)
    with pytest.raises(ValueError, match="conversation '0': 1 <image> in its turns, but 0"):
        chat_batch([Conversation(turns=turns)], FEATURES, MARKS)
    with pytest.raises(ValueError, match="has depth: this model reads text, image, audio"):
        chat_batch([Conversation(turns=turns, media={"depth": [1]})], FEATURES, MARKS)
    batch = chat_batch([Conversation(turns=turns, media={"image": ["nowhere.png"]})], FEATURES, MARKS, ids=["q"])
    assert batch.ids == ("q",)
    assert not batch.inputs
    assert "no such file" in batch.faults[0].reason
    with pytest.raises(DecodeError, match="more than max_length"):
        pieces(Conversation(turns=(Turn(role="user", text="x" * 300),)), FEATURES, MARKS)


def module(path: Path, **options) -> ConversationModule:
    features = {"text": partial(Text, max_length=200), "image": FEATURES["image"], "audio": FEATURES["audio"]}
    loading = Loading(
        batch_size=2,
        batch_tokens=None,
        eval_batch_size=4,
        num_workers=0,
        timeout=60,
        decode_timeout=None,
        pin_memory=False,
    )
    given = {"conversations": partial(read_conversations, str(path)), "features": features,
             "tokenizer": WordTokenizer.train, "augment": None, "marks": None, "loading": loading, "options": {},
             "seed": 0} | options  # fmt: skip
    return ConversationModule(**given)


def test_the_data_module_gives_loaders_and_facts(tmp_path):
    data = module(write(tmp_path))
    data.setup()
    facts = data.facts()
    size = data.tokenizer.vocab_size
    assert facts["chat"] == {"user": size, "assistant": size + 1, "end": size + 2}
    assert (facts["vocab_size"], facts["mask_id"], facts["modalities"]) == (size + 3, 4, ["text", "image", "audio"])
    assert set(facts["special_ids"]) == {0, 1, 2, 3, 4, size, size + 1, size + 2}
    assert "<image>" not in data.tokenizer.words
    assert "image" not in data.tokenizer.words
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == 2
    assert batch.inputs["text"].values.max() < facts["vocab_size"]
    assert data.has("val")
    assert not data.has("test")
    assert data.summary()[0].endswith("conversations train 3, val 1; text, image, audio")
    sizes = data.splits["train"].num_tokens()
    assert sizes[1] > sizes[0] > sizes[2]


def test_its_manifest_shows_a_report_the_text_and_the_first_picture(tmp_path):
    manifest = read_conversations(str(write(tmp_path))).manifest
    assert manifest.text(0) == "user: What is on <image>?\nassistant: a circle\nuser: red?\nassistant: yes"
    assert manifest.source("image", 1).name == "1.png"
    assert manifest.source("image", 2) is None
    assert manifest.where("audio", 3) == "0.wav"


def test_marks_of_a_published_vocabulary_are_taken_as_they_are(tmp_path):
    data = module(write(tmp_path), marks={"user": 2, "assistant": 3, "end": 4})
    data.setup()
    assert data.facts()["vocab_size"] == data.tokenizer.vocab_size
    assert data.facts()["chat"] == {"user": 2, "assistant": 3, "end": 4}


def test_media_without_a_feature_are_told(tmp_path):
    features = {"text": partial(Text, max_length=200), "image": FEATURES["image"]}
    with pytest.raises(ManifestError, match=r"has audios: give data\.features\.audio"):
        module(write(tmp_path), features=features).setup()
