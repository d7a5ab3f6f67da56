"""Texts that a trained model writes: captions and answers behind a prompt, turns of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mmformer.batch import Batch, Ragged
from mmformer.datasets.chat import Marks, Turn
from mmformer.datasets.features import Feature, Text
from mmformer.generation import Limits, Search, Writer
from mmformer.model import Model
from mmformer.objectives import Generates, NextToken, StartingWith
from mmformer.visibility import Visibility


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a model writes, as it was trained to: by which head, as texts of which feature, behind what.

    A prompt begins with the id `first`, where there is one, and ends in `start`; a text ends in `stop`. `marks` are
    those of conversations.
    """

    writer: Writer
    text: Text
    first: int | None
    start: int | None
    stop: tuple[int, ...]
    marks: Marks | None

    @classmethod
    def of(
        cls, model: Model, objectives: Mapping[str, nn.Module], features: Mapping[str, Feature], marks: Marks | None
    ) -> Writing:
        """By the first objective that reads or writes texts token by token.

        Raises:
            ValueError: there is none, or no feature of what it writes.
        """
        for whole in objectives.values():
            inner = whole.objective if isinstance(whole, StartingWith) else whole
            if isinstance(inner, NextToken | Generates):
                break
        else:
            raise ValueError(f"this model was trained for {', '.join(objectives) or 'nothing'}, which writes no texts")
        text = features.get(inner.modality)
        if not isinstance(text, Text):
            raise ValueError(f"this model writes {inner.modality!r}, of which it has no texts: only {list(features)}")
        assert inner.visibility is None or isinstance(inner.visibility, Visibility)
        return cls(
            writer=Writer(
                model=model, head=inner.head, modality=inner.modality, source=inner.source, visibility=inner.visibility
            ),
            text=text,
            first=whole.first if isinstance(whole, StartingWith) else None,
            start=inner.start,
            stop=_stop(inner, text, marks),
            marks=marks,
        )

    def limits(self, max_length: int, **options) -> Limits:
        """Limits under which a text holds no id that no text has; options as in `Limits`."""
        specials = {*self.text.tokenizer.specials.all, *([self.marks.user, self.marks.assistant] if self.marks else [])}
        banned = {*specials, *options.pop("banned", ())} - set(self.stop)
        return Limits(max_length=max_length, stop=self.stop, banned=tuple(sorted(banned)), **options)

    def prompted(self, batch: Batch) -> Batch:
        """The batch with the prompts that the model was trained to go on from; a sample without a text gets one too."""
        given: dict[int, list[int]] = {}
        if self.writer.modality in batch.inputs:
            given = {row: ids.tolist() for row, ids in batch.inputs[self.writer.modality].items()}
        prompts = {row: self._prompt(given.get(row)) for row in range(len(batch))}
        rows = [row for row, ids in prompts.items() if ids]
        inputs = {name: items for name, items in batch.inputs.items() if name != self.writer.modality}
        if rows:
            device = next(self.writer.model.parameters()).device
            items = [torch.tensor(prompts[row], device=device) for row in rows]
            inputs[self.writer.modality] = Ragged.stack(items, rows)
        return replace(batch, inputs=inputs)

    def _prompt(self, ids: list[int] | None) -> list[int]:
        """The ids of a text as a prompt; those that begin one where there is none."""
        around = self.text.tokenizer.specials
        begin, end = (
            list(own) if on else [] for own, on in ((around.begin, self.text.begin), (around.end, self.text.end))
        )
        ids = begin if ids is None else ids
        if end and ids[-len(end) :] == end:
            ids = ids[: -len(end)]
        if self.first is not None:
            ids = [self.first, *ids[1:]]
        return ids if self.start is None or self.start in ids else [*ids, self.start]

    def write(self, batch: Batch, limits: Limits, search: Search) -> list[list[str]]:
        """The texts that a search finds for each sample of a batch of prompts, the best first."""
        with torch.inference_mode():
            found = search(self.writer.read(batch), limits)
        return [[self.text.tokenizer.decode(text.ids) for text in texts] for texts in found]


def _stop(objective: NextToken | Generates, text: Text, marks: Marks | None) -> tuple[int, ...]:
    """The ids that end a text."""
    if isinstance(objective, Generates):
        return tuple(objective.limits.stop)
    if objective.end is not None:
        return (objective.end,)
    if marks is not None:
        return (marks.end,)
    return text.tokenizer.specials.end[:1] if text.end else ()


def turns_of(said: Sequence[str | Turn]) -> tuple[Turn, ...]:
    """Turns in the place of texts, of which the user's is the first and then every other.

    Raises:
        ValueError: the last one is not the user's.
    """
    roles = ("user", "assistant")
    turns = tuple(t if isinstance(t, Turn) else Turn(role=roles[i % 2], text=t) for i, t in enumerate(said))
    if not turns or turns[-1].role != "user":
        raise ValueError(f"{len(turns)} turns, of which the last is not the user's: there is nothing to answer")
    return turns
