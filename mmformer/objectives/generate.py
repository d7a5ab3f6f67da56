"""Judge a model by what it writes: captions, answers, the turns of a dialogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmformer.batch import Batch, Ragged
from mmformer.generation import Greedy, Limits, Search, Writer
from mmformer.generation.draft import ordered
from mmformer.model import Encoded, Model
from mmformer.objectives.objective import Objective
from mmformer.tokens import Tokens, segments, take
from mmformer.visibility import Visibility

Ids = list[int]
Prompt = list[tuple[int, Ids]]
"""The place and the ids of each text that is given."""


class Generates(Objective):
    """Write the texts of a modality and compare them with the true ones; nothing is trained by it.

    With `start`, what is written follows an id `start` of a sample's texts (a turn of the assistant, the answer to a
    question), and what stood there is wanted: each of them in turn, behind the true ones before it. Without it all but
    the first token of a text is. Where `answer` names another input, or a target of rows of ids filled up with -100,
    that is wanted, behind a text as it is. `limits.stop` ends a text and is no part of one, true or written. Other
    options as in `mmformer.generation.Writer`.

    It predicts, for each sample and each of its turns, the `ids` that the search likes best and those that are
    `wanted`, both filled up with -1; `present` is whether there is a text to go on from and one to compare with.
    """

    headline = ("exact", "max")

    def __init__(
        self,
        head: str,
        limits: Limits,
        modality: str = "text",
        *,
        start: int | None = None,
        answer: str | None = None,
        search: Search | None = None,
        source: str | None = None,
        visibility: Visibility | None = None,
    ):
        super().__init__()
        self.head, self.limits, self.modality = head, limits, modality
        self.start, self.answer, self.search = start, answer, search or Greedy()
        self.source, self.visibility = source, visibility

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        return {}

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        parted = self._parted(batch) if self.modality in batch.inputs else [[] for _ in batch.ids]
        turns = max(map(len, parted), default=0)
        written: list[list[Ids]] = [[[]] * turns for _ in parted]
        with torch.inference_mode():
            for turn in range(turns):  # and not all at once, which would need the memory of so many samples
                rows = [row for row, parts in enumerate(parted) if turn < len(parts)]
                asked = _asked(batch, self.modality, encoded, rows, [parted[row][turn][0] for row in rows])
                for row, texts in zip(rows, self.search(self._writer(model).read(*asked), self.limits), strict=True):
                    written[row][turn] = list(texts[0].ids)
        wanted = [[want for _, want in parts] + [[]] * (turns - len(parts)) for parts in parted]
        present = [[bool(want) for want in row] for row in wanted]
        return {
            "ids": _filled(written, turns).to(device),
            "wanted": _filled(wanted, turns).to(device),
            "present": torch.tensor(present, dtype=torch.bool, device=device).view(len(batch), turns),
        }

    def meter(self) -> GenerationMeter:
        return GenerationMeter()

    def _writer(self, model: Model) -> Writer:
        return Writer(
            model=model, head=self.head, modality=self.modality, source=self.source, visibility=self.visibility
        )

    def _parted(self, batch: Batch) -> list[list[tuple[Prompt, Ids]]]:
        """For each sample and each of its turns the texts that are given, and the ids that are wanted behind."""
        texts = _texts(batch.inputs[self.modality], len(batch))
        if self.answer is None:
            return [self._cuts(row) for row in texts]
        prompts = [[*row[:-1], (row[-1][0], self._bare(row[-1][1]))] if row else [] for row in texts]
        answers = _answers(batch, self.answer)
        pairs = zip(prompts, answers, strict=True)
        return [[(prompt, self._bare(ids))] if prompt and prompt[-1][1] else [] for prompt, ids in pairs]

    def _cuts(self, row: Prompt) -> list[tuple[Prompt, Ids]]:
        """For each turn of a sample its texts up to where it is to write, and what stands behind in the same text."""
        if self.start is None:
            return [([(row[0][0], row[0][1][:1])], self._bare(row[0][1][1:]))] if row else []
        return [
            ([*row[:number], (place, ids[: at + 1])], self._bare(ids[at + 1 :]))
            for number, (place, ids) in enumerate(row)
            for at, id in enumerate(ids)
            if id == self.start
        ]

    def _bare(self, ids: Sequence[int]) -> Ids:
        """Ids up to the first that ends a text."""
        ends = [i for i, id in enumerate(ids) if id in self.limits.stop]
        return list(ids[: ends[0]] if ends else ids)


def _texts(items: Ragged, num_samples: int) -> list[Prompt]:
    """For each sample the place and ids of its texts, in their order."""
    rows = [[(place, ids.tolist()) for place, ids in row] for row in ordered(items)]
    return rows + [[] for _ in range(num_samples - len(rows))]


def _answers(batch: Batch, name: str) -> list[Ids]:
    """The ids of an input or of a target.

    Raises:
        KeyError: the batch has neither.
    """
    if name in batch.targets:
        return [[id for id in row if id >= 0] for row in batch.targets[name].tolist()]
    if name not in batch.inputs:
        have = sorted({*batch.inputs, *batch.targets})
        raise KeyError(f"no input or target {name!r} to compare texts with: the batch has {have}")
    return [[id for _, ids in row for id in ids] for row in _texts(batch.inputs[name], len(batch))]


def _asked(
    batch: Batch, modality: str, encoded: Encoded, rows: Sequence[int], prompts: Sequence[Prompt]
) -> tuple[Batch, dict[str, Tokens]]:
    """Some samples with other texts, and what of the other modalities stands before the end of these."""
    held = [(new, place, ids) for new, prompt in enumerate(prompts) for place, ids in prompt]
    new, places, ids = zip(*held, strict=True)
    device = batch.inputs[modality].values.device
    items = Ragged.stack([torch.tensor(own, device=device) for own in ids], new, places=places)
    ends = [prompt[-1][0] for prompt in prompts]
    before = {name: _until(take(tokens, rows), ends) for name, tokens in encoded.items() if name != modality}
    asked = Batch(ids=tuple(batch.ids[row] for row in rows), inputs={modality: items})
    return asked, {name: tokens for name, tokens in before.items() if tokens is not None}


def _until(tokens: Tokens, ends: Sequence[int]) -> Tokens | None:
    """The items before place `ends[sample]` of their sample, or all where they have no places; None for none."""
    layout = tokens.layout
    if layout is None or not layout.places:
        return tokens
    standing = zip(layout.samples, layout.places, strict=True)
    kept = [i for i, (sample, place) in enumerate(standing) if place < ends[sample]]
    if not kept:
        return None
    spans = np.concatenate([np.arange(*layout.offsets[i : i + 2]) for i in kept])
    fields = {name: tuple(getattr(layout, name)[i] for i in kept) for name in ("samples", "lengths", "places")}
    part, index = replace(layout, **fields), torch.from_numpy(spans).to(tokens.x.device)
    x, modality, position = (field.index_select(1, index) for field in (tokens.x, tokens.modality, tokens.position))
    segment = segments(part, part.total, tokens.x.device)
    return Tokens(x=x, modality=modality, position=position, segment=segment, layout=part)


def _filled(texts: Sequence[Sequence[Ids]], turns: int) -> Int[Tensor, "B turns L"]:
    """Ids of each turn of each sample, filled up with -1."""
    width = max((len(ids) for row in texts for ids in row), default=0)
    filled = [[[*ids, *[-1] * (width - len(ids))] for ids in row] for row in texts]
    return torch.tensor(filled, dtype=torch.long).view(len(texts), turns, width)


def exact(prediction: dict[str, Tensor]) -> Bool[Tensor, "B turns"]:
    """Which texts are written exactly as wanted."""
    ids, wanted = prediction["ids"], prediction["wanted"]
    width = max(ids.shape[2], wanted.shape[2])
    ids, wanted = (torch.nn.functional.pad(x, (0, width - x.shape[2]), value=-1) for x in (ids, wanted))
    return (ids == wanted).all(2)


class GenerationMeter:
    """The share of texts that are written exactly as wanted (`exact`)."""

    def __init__(self) -> None:
        self.right = self.all = 0

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None:
        present = prediction["present"]
        self.all += int(present.sum())
        self.right += int((exact(prediction) & present).sum())

    def compute(self) -> dict[str, float]:
        return {"exact": self.right / self.all} if self.all else {}
