"""Speech to text without saying where each letter is: connectionist temporal classification."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmformer.batch import Batch, Ragged
from mmformer.losses.alignment import ctc_losses, greedy
from mmformer.metrics.text import character_error_rate, word_error_rate
from mmformer.model import Encoded, Model
from mmformer.objectives import ranks
from mmformer.objectives.language import sequence, untouched
from mmformer.objectives.objective import Objective
from mmformer.tokens import find


class CTC(Objective):
    """The text of a sample from its tokens of another modality, by the likelihood of all alignments.

    `head` scores the vocabulary, in which `blank` is an id that no text has, such as that of padding. The tokens are
    those of the encoder of `modality`, or with `fused` those of the fused sequence. The text is only a target: the
    model needs no encoder of it, and if it has one, no fused sequence may show it. Samples lacking one of the two count
    for nothing. The mean is over samples, each by the length of its text. `space` is the id between words, for the
    word error rate.
    """

    headline = ("cer", "min")
    by_subset = False

    def __init__(
        self, head: str, blank: int, *, modality: str = "audio", text: str = "text", fused: bool = False,
        space: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.head, self.blank, self.space = head, blank, space
        self.modality, self.text, self.fused = modality, text, fused

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        wanted = self._wanted(batch)
        scored = [(row, logits) for row, logits in self._logits(model, encoded) if row in wanted]
        if not scored:
            return {"loss": ranks.shared_mean(untouched(model.heads[self.head]), 0)} if ranks.active() else {}
        texts = [wanted[row] for row, _ in scored]
        losses = ctc_losses(
            pad_sequence([logits for _, logits in scored], batch_first=True),
            [len(logits) for _, logits in scored],
            torch.cat(texts),
            [len(ids) for ids in texts],
            self.blank,
        )
        return {"loss": ranks.shared_mean(losses.sum(), len(scored))}

    def _wanted(self, batch: Batch) -> dict[int, Int[Tensor, " n"]]:
        """The text of each sample that has one."""
        return _by_row(batch.inputs[self.text]) if self.text in batch.inputs else {}

    def _logits(self, model: Model, encoded: Encoded) -> Iterator[tuple[int, Float[Tensor, "t V"]]]:
        """The scores of each token of the samples that have any, in the order of the sequence.

        Raises:
            KeyError: no head of that name.
            ValueError: padded tokens.
        """
        if self.head not in model.heads:
            raise KeyError(f"no head {self.head!r}: this model has {sorted(model.heads)}")
        if self.modality not in encoded:
            return
        layout = encoded[self.modality].layout
        if layout is None:
            raise ValueError(f"padded tokens of {self.modality}: CTC must know how many there are, so give packed ones")
        tokens = sequence(model, encoded, None if self.fused else self.modality)
        where, token = find(tokens, self.modality, layout)
        logits = model.heads[self.head](tokens.x.flatten(0, 1).index_select(0, where))
        sample = layout.sample_of_token[token]
        starts = np.flatnonzero(np.diff(sample, prepend=-1))
        yield from zip(sample[starts].tolist(), logits.split(np.diff(starts, append=len(sample)).tolist()), strict=True)

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """The ids that are heard (`ids`) and those of the text (`wanted`), -1 behind the last; a text lacking is -2."""
        empty = torch.empty(0, dtype=torch.long, device=next(model.parameters()).device)
        heard, wanted = dict(self._logits(model, encoded)), self._wanted(batch)
        said = {row: empty.new_tensor(greedy(logits, self.blank)) for row, logits in heard.items()}
        missing = empty.new_tensor([-2])
        return {
            "ids": _rows([said.get(row, empty) for row in range(len(batch))]),
            "wanted": _rows([wanted.get(row, missing) if row in heard else missing for row in range(len(batch))]),
        }

    def meter(self) -> ErrorMeter:
        return ErrorMeter(self.space)


def _by_row(items: Ragged) -> dict[int, Tensor]:
    """The ids of each sample, those of several texts by their place."""
    held: dict[int, list[tuple[int, Tensor]]] = {}
    places = items.places or tuple(range(len(items)))
    for (row, item), place in zip(items.items(), places, strict=True):
        held.setdefault(row, []).append((place, item))
    return {
        row: torch.cat([item for _, item in sorted(parts, key=lambda part: part[0])]) for row, parts in held.items()
    }


def _rows(texts: Sequence[Int[Tensor, " _"]]) -> Int[Tensor, "B L"]:
    return pad_sequence(list(texts), batch_first=True, padding_value=-1)


class ErrorMeter:
    """Edits per id of the texts that are wanted (`cer`), and per word where the id of the space is known (`wer`)."""

    def __init__(self, space: int | None):
        self.space = space
        self._said: list[str] = []
        self._wanted: list[str] = []

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None:
        for said, wanted in zip(prediction["ids"].tolist(), prediction["wanted"].tolist(), strict=True):
            if wanted[:1] != [-2]:
                self._said.append(self._letters(said))
                self._wanted.append(self._letters(wanted))

    def compute(self) -> dict[str, float]:
        if not any(self._wanted):
            return {}
        rates = {"cer": character_error_rate(self._said, self._wanted)}
        return rates if self.space is None else rates | {"wer": word_error_rate(self._said, self._wanted)}

    def _letters(self, ids: Sequence[int]) -> str:
        """A letter for each id: which one is all the same, as long as it is no space."""
        return "".join(" " if i == self.space else chr(0x10000 + i) for i in ids if i >= 0)
