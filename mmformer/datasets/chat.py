"""Conversations about pictures and sounds as batches: the one way for training, evaluation and chat.

text item                      image    text item
[user] What is on              <image>  ? [end] [assistant] a red circle [end]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmformer.batch import Batch, Fault, Ragged
from mmformer.datasets.features import Feature, Text
from mmformer.datasets.sources import DecodeError

ROLES = ("user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side says; `<image>` in a user's text stands for the next picture, `<audio>` for the next sound."""

    role: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns, and for each modality the pictures or sounds that they name, in that order."""

    turns: tuple[Turn, ...]
    media: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Ids in front of a user's and of an assistant's turn, and behind each turn; no text may ever give one of them."""

    user: int
    assistant: int
    end: int

    @classmethod
    def behind(cls, vocab_size: int) -> Marks:
        """The three ids behind a vocabulary, which its tokenizer cannot give whatever a user writes."""
        return cls(user=vocab_size, assistant=vocab_size + 1, end=vocab_size + 2)


def placeholder(modality: str) -> str:
    """What stands in a text for a picture, a sound or another item."""
    return f"<{modality}>"


def misfit(conversation: Conversation, modalities: Sequence[str]) -> str | None:
    """Why turns and media do not belong together, with both numbers; None where they do."""
    if not conversation.turns:
        return "no turns: give one at least"
    for number, turn in enumerate(conversation.turns, 1):
        if turn.role not in ROLES:
            return f"turn {number} has the role {turn.role!r}: give {' or '.join(ROLES)}"
    for modality in dict.fromkeys([*modalities, *conversation.media]):
        named = sum(turn.text.count(placeholder(modality)) for turn in conversation.turns)
        given = len(conversation.media.get(modality, ()))
        if named != given:
            return (
                f"{named} {placeholder(modality)} in its turns, but {given} in its {modality}s: "
                "give one for each, in the order of the text"
            )
    return None


def pieces(
    conversation: Conversation, features: Mapping[str, Feature], marks: Marks, reply: bool = False
) -> list[tuple[str, Tensor]]:
    """The items of a conversation in their order, each with its modality; texts are cut where media stand.

    With `reply` an assistant's turn is opened behind the last, for a model to go on. Media are what their features
    take, or tensors that these have made.

    Raises:
        DecodeError: a text longer than `max_length` of its feature, or media that cannot be read.
    """
    text = features["text"]
    assert isinstance(text, Text)
    media = {name: iter(values) for name, values in conversation.media.items()}
    cut = re.compile("|".join(map(re.escape, map(placeholder, media)))) if media else None
    found: list[tuple[str, Tensor]] = []
    ids: list[int] = list(text.tokenizer.specials.begin) if text.begin else []
    length = 0

    def close() -> None:
        nonlocal ids, length
        if ids:
            found.append(("text", torch.tensor(ids)))
        ids, length = [], length + len(ids)

    for turn in conversation.turns:
        ids.append(marks.assistant if turn.role == "assistant" else marks.user)
        start = 0
        for match in cut.finditer(turn.text) if cut else ():
            ids += text.tokenizer.encode(turn.text[start : match.start()])
            close()
            modality = match.group()[1:-1]
            value = next(media[modality])
            found.append((modality, value if isinstance(value, Tensor) else features[modality](value)))
            start = match.end()
        ids += [*text.tokenizer.encode(turn.text[start:]), marks.end]
    if reply:
        ids.append(marks.assistant)
    close()
    if length > text.max_length:
        raise DecodeError(f"{length} ids of text, more than max_length {text.max_length}: split it or raise that")
    return found


def join(samples: Sequence[Sequence[tuple[str, Tensor]]], features: Mapping[str, Feature]) -> dict[str, Ragged]:
    """The items of several conversations by modality, each with its sample and its place in it."""
    out = {}
    for modality, feature in features.items():
        held = [
            (item, row, place)
            for row, sample in enumerate(samples)
            for place, (name, item) in enumerate(sample)
            if name == modality
        ]
        if held:
            items, rows, places = zip(*held, strict=True)
            out[modality] = Ragged.stack(items, rows, feature.feature_dims, places)
    return out


def chat_batch(
    conversations: Sequence[Conversation],
    features: Mapping[str, Feature],
    marks: Marks,
    *,
    ids: Sequence[str] = (),
    reply: bool = True,
) -> Batch:
    """Conversations in memory as a batch; media are paths, bytes, PIL images or arrays, as `collate` takes them.

    With `reply` each is left where the assistant is to speak. One that cannot be read has no items, and is listed in
    the faults.

    Raises:
        ValueError: turns that do not fit their media, or media that this model has no feature for.
    """
    names = tuple(ids) or tuple(str(i) for i in range(len(conversations)))
    samples, faults = [], []
    for name, conversation in zip(names, conversations, strict=True):
        if unknown := sorted(set(conversation.media) - set(features)):
            raise ValueError(f"conversation {name!r} has {', '.join(unknown)}: this model reads {', '.join(features)}")
        if reason := misfit(conversation, list(features)):
            raise ValueError(f"conversation {name!r}: {reason}")
        try:
            samples.append(pieces(conversation, features, marks, reply))
        except DecodeError as error:
            samples.append([])
            faults.append(Fault(id=name, column="turns", path="", reason=str(error)))
    return Batch(
        ids=names, inputs=join(samples, features), faults=tuple(faults), indices=tuple(range(len(conversations)))
    )
