"""Judge a model by what it writes: captions, answers, the last turn of a dialogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from mmformer.batch import Batch, Ragged
from mmformer.generation import Greedy, Limits, Search, Writer
from mmformer.generation.draft import ordered
from mmformer.model import Encoded, Model
from mmformer.objectives.objective import Objective
from mmformer.visibility import Visibility

Ids = list[int]


class Generates(Objective):
    """Write the texts of a modality and compare them with the true ones; nothing is trained by it.

    With `start`, what is written follows the last id `start` of a sample's texts (the assistant's last turn, the answer
    to a question), and what stood there is wanted; without it all but the first token of a text is. Where `answer`
    names another input, or a target of rows of ids filled up with -100, that is wanted, behind a text as it is.
    `limits.stop` ends a text and is no part of one, true or written. Other options as in `mmformer.generation.Writer`.

    It predicts, for each sample, the `ids` that the search likes best and those that are `wanted`, both filled up with
    -1; `present` is whether there is a text to go on from and one to compare with.
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
        if self.modality not in batch.inputs:
            none = torch.full((len(batch), 0), -1, device=device)
            return {"ids": none, "wanted": none, "present": torch.zeros(len(batch), dtype=torch.bool, device=device)}
        prompts, wanted = self._parted(batch)
        with torch.inference_mode():
            draft = self._writer(model).read(_asked(batch, self.modality, prompts), encoded)
            written = self.search(draft, self.limits)
        present = [bool(prompt and want) for prompt, want in zip(prompts, wanted, strict=True)]
        return {
            "ids": _filled([list(texts[0].ids) for texts in written]).to(device),
            "wanted": _filled(wanted).to(device),
            "present": torch.tensor(present, device=device),
        }

    def meter(self) -> GenerationMeter:
        return GenerationMeter()

    def _writer(self, model: Model) -> Writer:
        return Writer(
            model=model, head=self.head, modality=self.modality, source=self.source, visibility=self.visibility
        )

    def _parted(self, batch: Batch) -> tuple[list[list[tuple[int, Ids]]], list[Ids]]:
        """For each sample the place and ids of what it is given, and the ids that are wanted behind."""
        texts = _texts(batch.inputs[self.modality], len(batch))
        if self.answer is not None:
            prompts = [[*row[:-1], (row[-1][0], self._bare(row[-1][1]))] if row else [] for row in texts]
            return prompts, [self._bare(ids) for ids in _answers(batch, self.answer)]
        parts = [self._cut(row) for row in texts]
        return [prompt for prompt, _ in parts], [wanted for _, wanted in parts]

    def _cut(self, row: list[tuple[int, Ids]]) -> tuple[list[tuple[int, Ids]], Ids]:
        """The texts of one sample up to where it is to write, and what stands behind in the same text."""
        for number in reversed(range(len(row))):
            place, ids = row[number]
            if self.start is None or self.start in ids:
                at = 1 if self.start is None else len(ids) - ids[::-1].index(self.start)
                number = 0 if self.start is None else number
                place, ids = row[number]
                return [*row[:number], (place, ids[:at])], self._bare(ids[at:])
        return [], []

    def _bare(self, ids: Sequence[int]) -> Ids:
        """Ids up to the first that ends a text."""
        ends = [i for i, id in enumerate(ids) if id in self.limits.stop]
        return list(ids[: ends[0]] if ends else ids)


def _texts(items: Ragged, num_samples: int) -> list[list[tuple[int, Ids]]]:
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


def _asked(batch: Batch, modality: str, prompts: list[list[tuple[int, Ids]]]) -> Batch:
    """The batch with other texts; a sample without any gets one that counts for nothing."""
    given = [(row, place, ids) for row, own in enumerate(prompts) for place, ids in own or [(0, [0])]]
    rows, places, ids = zip(*given, strict=True)
    device = batch.inputs[modality].values.device
    items = Ragged.stack([torch.tensor(own, device=device) for own in ids], rows, places=places)
    return replace(batch, inputs=batch.inputs | {modality: items})


def _filled(texts: Sequence[Ids]) -> Int[Tensor, "B L"]:
    """Rows of ids, filled up with -1."""
    width = max(map(len, texts), default=0)
    return torch.tensor([[*ids, *[-1] * (width - len(ids))] for ids in texts], dtype=torch.long).view(len(texts), width)


class GenerationMeter:
    """The share of texts that are written exactly as wanted (`exact`)."""

    def __init__(self) -> None:
        self.right = self.all = 0

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None:
        rows = zip(*(prediction[name].tolist() for name in ("ids", "wanted", "present")), strict=True)
        for ids, wanted, present in rows:
            if present:
                self.all += 1
                self.right += [id for id in ids if id >= 0] == [id for id in wanted if id >= 0]

    def compute(self) -> dict[str, float]:
        return {"exact": self.right / self.all} if self.all else {}
