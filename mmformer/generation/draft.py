"""Texts that are being written: what each sample has so far, and what may come next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmformer.batch import Batch, Ragged
from mmformer.encoders import Encoder
from mmformer.fusion import View
from mmformer.model import Model
from mmformer.nn import Memory
from mmformer.pooling import LastPool
from mmformer.tokens import PADDING, Tokens
from mmformer.visibility import Visibility


@dataclass(frozen=True, kw_only=True)
class Writer:
    """How a model writes: by which of its vocabulary heads, as tokens of which modality, off which sequence.

    The sequence is the fused one under `visibility` on top of the fusion's own rule; where `source` is named, that of a
    view, or of the encoder of the modality, which it also is in a model without a fusion.

    Raises:
        KeyError: the model has no such head or encoder.
        ValueError: a source that is neither a view nor the modality.
    """

    model: Model
    head: str = "vocabulary"
    modality: str = "text"
    source: str | None = None
    visibility: Visibility | None = None

    def __post_init__(self) -> None:
        if self.head not in self.model.heads:
            raise KeyError(f"no head {self.head!r} to write with: this model has {sorted(self.model.heads)}")
        if self.modality not in self.model.encoders:
            raise KeyError(f"no encoder of {self.modality!r} to write: this model has {sorted(self.model.encoders)}")
        if self.source not in (None, self.modality, *self.model.views):
            raise ValueError(f"source {self.source!r}: name a view, {self.modality!r} itself, or none")

    def read(self, batch: Batch, encoded: Mapping[str, Tokens] | None = None) -> Draft:
        """The samples of a batch, read once: what they have of the modality is the prompt, all else the context.

        `encoded` has the tokens of other modalities where they are known; those of the modality are made anew, as they
        must be remembered. Samples may lack any modality, and prompts be of any length.

        Raises:
            ValueError: a part that sees ahead, or a sample without any token that the first one could follow.
        """
        prompts = batch.inputs.get(self.modality)
        context = {name: tokens for name, tokens in self._context(batch, encoded).items() if name != self.modality}
        memory = Memory(self.modality)
        found = dict(context)
        if prompts is not None:
            found[self.modality] = self._encoder(prompts, len(batch), memory)
        tokens = self._first(found, len(batch), memory)
        self._check_all_have_tokens(tokens, batch)
        place = _next_places(prompts, context, len(batch))
        device = tokens.x.device
        return Draft(
            writer=self,
            memory=memory,
            scores=self.model.heads[self.head](LastPool()(tokens)).float(),
            ids=_history(prompts, len(batch)).to(device),
            place=torch.tensor([time for time, _ in place], device=device),
            item=torch.tensor([item for _, item in place], device=device),
            names=batch.ids,
        )

    def extend(
        self, memory: Memory, ids: Int[Tensor, "B n"], place: Int[Tensor, " B"], item: Int[Tensor, " B"]
    ) -> Float[Tensor, "B n V"]:
        """The logits behind each of further ids, of which -1 is padding; `place` and `item` are those of the first."""
        real = ids >= 0
        time = place[:, None] + (real.cumsum(1) - 1).clamp(min=0)
        position = torch.nn.functional.pad(time[..., None], (0, 2))
        segment = torch.where(real, item[:, None], PADDING)
        tokens = self._encoder.extend(ids.clamp(min=0), position, segment, memory)
        if self._fuses and self.model.fusion is not None:
            tokens = self.model.fusion.extend(self.modality, tokens, memory, self._rule)
        return self.model.heads[self.head](tokens.x).float()

    @property
    def _fuses(self) -> bool:
        return self.model.fusion is not None and self.source != self.modality

    @property
    def _rule(self) -> Visibility | None:
        """What adds to the fusion's own rule."""
        rules = [rule for rule in (self._view and self._view.visibility, self.visibility) if rule is not None]
        return rules[0] & rules[-1] if rules else None

    @property
    def _view(self) -> View | None:
        view = self.model.views[self.source] if self.source and self.source in self.model.views else None
        assert view is None or isinstance(view, View)
        return view

    @property
    def _encoder(self) -> Encoder:
        encoder = self.model.encoders[self.modality]
        if not isinstance(encoder, Encoder):
            raise TypeError(f"{type(encoder).__name__} reads whole items: only an Encoder of texts can be continued")
        return encoder

    def _context(self, batch: Batch, encoded: Mapping[str, Tokens] | None) -> Mapping[str, Tokens]:
        if not self._fuses:
            return {}
        names = [name for name in self.model.encoders if name != self.modality]
        found = self.model.encode(batch.only(names)) if encoded is None else encoded
        return found if self._view is None else {name: found[name] for name in self._view.modalities if name in found}

    def _first(self, found: dict[str, Tokens], num_samples: int, memory: Memory) -> Tokens:
        """The first pass."""
        if self._fuses:
            assert self.model.fusion is not None
            return self.model.fusion(found, num_samples, self._rule, memory)
        if self.modality not in found:
            raise ValueError(f"no sample has a {self.modality} to go on from: give each a prompt, as a begin token")
        return found[self.modality]

    def _check_all_have_tokens(self, tokens: Tokens, batch: Batch) -> None:
        assert tokens.layout is not None  # encoders make packed tokens
        if lacking := sorted(set(range(len(batch))) - set(tokens.layout.samples)):
            raise ValueError(
                f"sample {batch.ids[lacking[0]]!r} has no token for the first {self.modality} token to follow: "
                "give it a prompt, as a begin token"
            )


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Samples whose texts are written on.

    `scores` are the logits of each next token. `ids` are those of prompt and text so far, right-aligned behind -1.
    `place` and `item` are the next token's place in its text, and which of the sample's texts that is; `names` tell
    the samples apart. `extend` uses the memory up: a draft can be extended once, but before that selected from at will.
    """

    writer: Writer
    memory: Memory
    scores: Float[Tensor, "B V"]
    ids: Int[Tensor, "B T"]
    place: Int[Tensor, " B"]
    item: Int[Tensor, " B"]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def extend(self, ids: Int[Tensor, " B"]) -> Draft:
        """The draft with one more token of each text."""
        scores = self.writer.extend(self.memory, ids[:, None], self.place, self.item)[:, 0]
        return replace(self, scores=scores, ids=torch.cat([self.ids, ids[:, None]], 1), place=self.place + 1)

    def follow(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B n V"]:
        """The logits behind each of several further tokens at once; -1 behind them is padding."""
        return self.writer.extend(self.memory, ids, self.place, self.item)

    def select(self, rows: Sequence[int]) -> Draft:
        """The samples named, in this order, each as often as it is named."""
        index = torch.tensor(rows, dtype=torch.long, device=self.ids.device)
        return replace(
            self,
            memory=self.memory.select(rows),
            scores=self.scores[index],
            ids=self.ids[index],
            place=self.place[index],
            item=self.item[index],
            names=tuple(self.names[row] for row in rows),
        )


def ordered(items: Ragged) -> list[list[tuple[int, Tensor]]]:
    """For each sample the place and the ids of its texts, in the order in which they stand."""
    places = items.places or (0,) * len(items)
    rows: list[list[tuple[int, Tensor]]] = [[] for _ in range(max(items.rows, default=-1) + 1)]
    for place, (row, ids) in zip(places, items.items(), strict=True):
        rows[row].append((place, ids))
    return [sorted(row, key=lambda own: own[0]) for row in rows]


def _history(prompts: Ragged | None, num_samples: int) -> Int[Tensor, "B T"]:
    """The ids of all prompts, right-aligned behind -1."""
    rows = [torch.cat([ids for _, ids in row]) if row else None for row in ordered(prompts)] if prompts else []
    width = max((len(row) for row in rows if row is not None), default=0)
    out = torch.full((num_samples, width), -1, device=prompts.values.device if prompts else None)
    for row, ids in enumerate(rows):
        if ids is not None:
            out[row, width - len(ids) :] = ids
    return out


def _next_places(prompts: Ragged | None, context: Mapping[str, Tokens], num_samples: int) -> list[tuple[int, int]]:
    """For each sample where in which of its texts the next token stands: behind the last, or in a new one.

    A new text begins where there is none, or where another modality has a later place in the sample.
    """
    latest = [-1] * num_samples
    for tokens in context.values():
        if tokens.layout is not None and tokens.layout.places:
            for sample, place in zip(tokens.layout.samples, tokens.layout.places, strict=True):
                latest[sample] = max(latest[sample], place)
    rows = ordered(prompts) if prompts is not None else []
    rows += [[] for _ in range(num_samples - len(rows))]
    return [
        (len(row[-1][1]), len(row) - 1) if row and row[-1][0] >= last else (0, len(row))
        for row, last in zip(rows, latest, strict=True)
    ]
