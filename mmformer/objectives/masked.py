"""Hide a part of what each modality says and guess it from the rest (BERT, BEiT, MAE, FLAVA, ALBEF)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from mmformer.batch import Batch, Ragged
from mmformer.encoders.codes import Coder
from mmformer.encoders.encoder import Encoder
from mmformer.encoders.patches import PlaneEmbedder, as_planes
from mmformer.losses.masking import Choice, code_losses, hide_words, patches, pixel_losses, standardized
from mmformer.model import Encoded, Model
from mmformer.objectives import ranks
from mmformer.objectives.language import sequence, untouched, words_loss
from mmformer.objectives.objective import Objective
from mmformer.objectives.space import Space
from mmformer.tokens import Layout, Tokens, find, take
from mmformer.visibility import Visibility


@dataclass(frozen=True, kw_only=True)
class Riddle:
    """Items of which something is hidden, the indices of the cells (or words) to be guessed, and what they are.

    `counts` are the cells of each item.
    """

    items: Ragged
    cells: Int[Tensor, " m"]
    answer: Tensor
    counts: Sequence[int]


@runtime_checkable
class Puzzle(Protocol):
    """Hides parts of the items of one modality, and judges what the head named `head` says in their place."""

    head: str

    def hide(self, encoder: nn.Module, items: Ragged, generator: Generator | None) -> Riddle: ...

    def losses(self, guess: Float[Tensor, "m O"], answer: Tensor) -> Float[Tensor, " m"]: ...

    def right(self, guess: Float[Tensor, "m O"], answer: Tensor) -> Bool[Tensor, " m"] | None:
        """Which guesses hit; None where that is no question."""
        ...


class Words(nn.Module):
    """Words of a text, as `hide_words` draws them; `head` scores the vocabulary."""

    def __init__(self, head: str, mask: int, vocab_size: int, special: Sequence[int], share: float = 0.15):
        super().__init__()
        self.head, self.mask, self.vocab_size, self.special, self.share = head, mask, vocab_size, list(special), share

    def hide(self, encoder: nn.Module, items: Ragged, generator: Generator | None) -> Riddle:
        """Other ids in the places of those that are to be guessed."""
        shown, chosen = hide_words(items.values, self.mask, self.vocab_size, self.special, self.share, generator)
        counts = [shape[0] for shape in items.shapes]
        cells = chosen.nonzero()[:, 0]  # special ids are known to the device alone, so it must tell how many
        return Riddle(items=replace(items, values=shown), cells=cells, answer=items.values[cells], counts=counts)

    def losses(self, guess: Float[Tensor, "m V"], answer: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """The cross-entropy of each."""
        return F.cross_entropy(guess.float(), answer, reduction="none")

    def right(self, guess: Float[Tensor, "m V"], answer: Int[Tensor, " m"]) -> Bool[Tensor, " m"]:
        """Which have the highest score."""
        return guess.argmax(-1) == answer


class Pixels(nn.Module):
    """Patches of pictures or spectrograms by their values, on the scale that the embedder works on (MAE, SimMIM).

    `choice` draws which (`Scattered`, `Blocks`). With `standardize` each patch is brought to mean 0 and variance 1,
    as it pays (MAE, arXiv 2111.06377, table 1d).
    """

    def __init__(self, head: str, choice: Choice, standardize: bool = True):
        super().__init__()
        self.head, self.choice, self.standardize = head, choice, standardize

    def hide(self, encoder: nn.Module, items: Ragged, generator: Generator | None) -> Riddle:
        """The mask vector in the places of the patches that are to be guessed."""
        embedder = embedder_of(encoder)
        hidden, counts = hide_cells(embedder, items, self.choice, generator)
        groups = (embedder.normalize(as_planes(group)) for group in items.groups())
        values = [patches(planes, *embedder.stem.grid(*planes.shape[1:3])).flatten(0, 1) for planes in groups]
        cells = _cells(hidden, items)
        answer = torch.cat(values).index_select(0, cells)
        shown = replace(items, hidden=hidden)
        return Riddle(
            items=shown, cells=cells, answer=standardized(answer) if self.standardize else answer, counts=counts
        )

    def losses(self, guess: Float[Tensor, "m P"], answer: Float[Tensor, "m P"]) -> Float[Tensor, " m"]:
        """The mean squared error of each."""
        return pixel_losses(guess, answer)

    def right(self, guess: Float[Tensor, "m P"], answer: Float[Tensor, "m P"]) -> None:
        """No guess is right or wrong."""


class Codes(nn.Module):
    """Patches of pictures or spectrograms by the ids that a codec gives their cells (BEiT, FLAVA).

    The codec must cut items into the same cells as the encoder. `sizes` are those of its codebooks.
    """

    def __init__(self, head: str, choice: Choice, codec: Coder, sizes: Sequence[int]):
        super().__init__()
        self.head, self.choice, self.codec, self.sizes = head, choice, codec, list(sizes)

    def hide(self, encoder: nn.Module, items: Ragged, generator: Generator | None) -> Riddle:
        """The mask vector in the places of the patches that are to be guessed.

        Raises:
            ValueError: the codec has other cells than the encoder.
        """
        hidden, counts = hide_cells(embedder_of(encoder), items, self.choice, generator)
        codes = self.codec.codes_of(items)
        if len(codes.values) != len(hidden):
            raise ValueError(
                f"the codec cuts these items into {len(codes.values)} cells and the encoder into {len(hidden)}: "
                "give both cells of one size"
            )
        cells = _cells(hidden, items)
        shown = replace(items, hidden=hidden)
        return Riddle(items=shown, cells=cells, answer=codes.values.index_select(0, cells), counts=counts)

    def losses(self, guess: Float[Tensor, "m V"], answer: Int[Tensor, "m Q"]) -> Float[Tensor, " m"]:
        """The cross-entropy of each, a mean over its codes."""
        return code_losses(guess, answer, self.sizes)

    def right(self, guess: Float[Tensor, "m V"], answer: Int[Tensor, "m Q"]) -> Bool[Tensor, " m"]:
        """Of which all codes have the highest score."""
        said = [part.argmax(-1) for part in guess.split(self.sizes, -1)]
        return (torch.stack(said, -1) == answer).all(-1)


def embedder_of(encoder: nn.Module) -> PlaneEmbedder:
    """The embedder of an encoder that cuts items into cells.

    Raises:
        TypeError: it has another.
    """
    embedder = encoder.embedder if isinstance(encoder, Encoder) else encoder
    if not isinstance(embedder, PlaneEmbedder):
        raise TypeError(
            f"{type(embedder).__name__} cuts items into no cells that could be hidden: use image_patches, mel_patches "
            "or their convolutions"
        )
    return embedder


def hide_cells(
    embedder: PlaneEmbedder, items: Ragged, choice: Choice, generator: Generator | None
) -> tuple[Bool[np.ndarray, " T"], list[int]]:
    """Which cells of all items are hidden, each item drawn on its own, and how many cells each has."""
    grids = [embedder.stem.grid(*_size(items, shape)) for shape in items.shapes]
    drawn = [choice(*grid, generator).flatten().numpy() for grid in grids]
    return np.concatenate(drawn), [rows * columns for rows, columns in grids]


def _size(items: Ragged, shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of a picture, frames and mels of a spectrogram."""
    return (shape[0], shape[1] if len(shape) == 2 else items.values.shape[1])


def _cells(hidden: Bool[np.ndarray, " T"], items: Ragged) -> Int[Tensor, " m"]:
    return torch.from_numpy(np.flatnonzero(hidden)).to(items.values.device, non_blocking=True)


class Masked(Objective):
    """Guess what `puzzles` hide of each modality, all of them in one pass; the mean over what is guessed.

    The guess is read in the place of what is hidden: off the fused sequence under `visibility`, or where `source` is
    named off a view or an encoder. Only samples count that have all modalities of `puzzles` and `needs` and none of
    `lacks`: FLAVA guesses words of a text alone by one head, and of one with a picture by another. `beside` are further
    objectives that see these samples as they are then, such as FLAVA's matching.
    """

    by_subset = False

    def __init__(
        self,
        puzzles: Mapping[str, Puzzle],
        *,
        source: str | None = None,
        visibility: Visibility | None = None,
        needs: Sequence[str] = (),
        lacks: Sequence[str] = (),
        beside: Mapping[str, Objective] | None = None,
    ):
        super().__init__()
        self.puzzles: Any = nn.ModuleDict(puzzles)  # pyright: ignore[reportArgumentType]
        self.source, self.visibility = source, visibility
        self.needs, self.lacks = {*puzzles, *needs}, set(lacks)
        self.beside: Any = nn.ModuleDict(beside or {})

    def prepare(self, model: Model) -> None:
        for objective in self.beside.values():
            objective.prepare(model)

    def advance(self, model: Model) -> None:
        for objective in self.beside.values():
            objective.advance(model)

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        rows = self._rows(batch)
        if not rows and not ranks.active():
            return {}
        shown, riddles = self._hide(model, encoded, batch, rows)
        part = batch if len(rows) == len(batch) else batch.select(rows)
        losses = {}
        for name, puzzle in self.puzzles.items():
            if rows:
                total, count = self._total(model, shown, name, riddles[name]), len(riddles[name].cells)
            else:
                total, count = untouched(model.heads[puzzle.head]), 0
            losses[name if len(self.puzzles) + len(self.beside) > 1 else "loss"] = ranks.shared_mean(total, count)
        for name, objective in self.beside.items():
            found = objective(model, shown, part)
            losses |= {name if key == "loss" else f"{name}_{key}": loss for key, loss in found.items()}
        return losses

    def _rows(self, batch: Batch) -> list[int]:
        """The samples that count."""
        return [row for row, has in enumerate(batch.present()) if self.needs <= has and not self.lacks & has]

    def _hide(self, model: Model, encoded: Encoded, batch: Batch, rows: list[int]) -> tuple[Encoded, dict[str, Riddle]]:
        """These samples as they are encoded with something hidden; what nothing is hidden of is taken as it is."""
        whole = len(rows) == len(batch)
        part = batch if whole else batch.only(list(self.puzzles)).select(rows)
        # Of an evaluation each batch is hidden alike, so that one epoch's numbers can be compared with another's.
        generator = None if self.training else Generator().manual_seed(0)
        tokens = {name: t if whole else take(t, rows) for name, t in encoded.items() if name not in self.puzzles}
        riddles: dict[str, Riddle] = {}
        for name, puzzle in self.puzzles.items() if rows else ():
            riddles[name] = puzzle.hide(model.encoders[name], part.inputs[name], generator)
            tokens[name] = model.encoders[name](riddles[name].items, len(rows))
        shown = Encoded({name: tokens[name] for name in model.encoders if name in tokens}, len(rows))
        if Space in encoded.shared:  # for a matching beside; it is that of the samples unhidden
            shown.shared[Space] = _of_rows(encoded.shared[Space], rows)
        return shown, riddles

    def _total(self, model: Model, shown: Encoded, name: str, riddle: Riddle) -> Float[Tensor, ""]:
        """The sum of the losses of what is hidden."""
        puzzle, states = self.puzzles[name], self._states(model, shown, name, riddle)
        head = model.heads[puzzle.head]
        if isinstance(puzzle, Words):
            return words_loss(head, states, riddle.answer)
        return puzzle.losses(head(states), riddle.answer).sum()

    def _states(self, model: Model, shown: Encoded, name: str, riddle: Riddle) -> Float[Tensor, "m D"]:
        """The tokens in the places of what is hidden."""
        layout = shown[name].layout
        assert layout is not None
        tokens = sequence(model, shown, self.source, self.visibility)
        where = _of_cells(tokens, name, layout, riddle.counts).index_select(0, riddle.cells)
        return tokens.x.flatten(0, 1).index_select(0, where)

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Of each sample and modality the number of things hidden (`<modality>_count`), and how they were guessed.

        `<modality>_loss` is their mean loss, `<modality>_acc` the share of right guesses; NaN without any.
        """
        rows = self._rows(batch)
        device = next(model.parameters()).device
        kinds = {f"{name}_{kind}": torch.nan for name in self.puzzles for kind in ("loss", "acc")}
        kinds |= {f"{name}_count": 0.0 for name in self.puzzles}
        out = {name: torch.full((len(batch),), fill, device=device) for name, fill in kinds.items()}
        if not rows:
            return out
        shown, riddles = self._hide(model, encoded, batch, rows)
        for name, puzzle in self.puzzles.items():
            riddle = riddles[name]
            guess = model.heads[puzzle.head](self._states(model, shown, name, riddle))
            right, losses = puzzle.right(guess, riddle.answer), puzzle.losses(guess, riddle.answer)
            owner = np.repeat([rows[row] for row in riddle.items.rows], riddle.counts)
            sample = torch.from_numpy(owner).to(device)[riddle.cells]
            count = _totals(torch.ones_like(losses), sample, len(batch))
            out[f"{name}_count"], out[f"{name}_loss"] = count, _totals(losses, sample, len(batch)) / count
            if right is not None:
                out[f"{name}_acc"] = _totals(right.float(), sample, len(batch)) / count
        return out

    def meter(self) -> MaskedMeter:
        return MaskedMeter(list(self.puzzles))


def _of_rows(space: Space, rows: Sequence[int]) -> Space:
    """The space of some samples."""
    index = torch.tensor(rows, dtype=torch.long, device=space.scale.device)
    asking, asked = ({name: x[index] for name, x in vectors.items()} for vectors in (space.rows, space.keys))
    return replace(space, rows=asking, keys=asked)


def _of_cells(tokens: Tokens, name: str, layout: Layout, counts: Sequence[int]) -> Int[Tensor, " T"]:
    """The index of each cell's token in the flattened sequence; class tokens of an item stand in front of its cells."""
    where, token = find(tokens, name, layout)
    extra = np.asarray(layout.lengths, dtype=np.int64) - np.asarray(counts, dtype=np.int64)
    own = np.arange(sum(counts)) + np.repeat(np.cumsum(extra), counts)
    place = np.argsort(token)[own]
    return where.index_select(0, torch.from_numpy(place).to(where.device, non_blocking=True))


def _totals(values: Float[Tensor, " m"], sample: Int[Tensor, " m"], num_samples: int) -> Float[Tensor, " B"]:
    return values.new_zeros(num_samples).index_add(0, sample, values)


class MaskedMeter:
    """Over all that was hidden of a modality: the mean loss (`masked_<modality>_loss`) and accuracy (`.._acc`)."""

    def __init__(self, modalities: Sequence[str]):
        self._sums = {f"{name}_{kind}": 0.0 for name in modalities for kind in ("loss", "acc")}
        self._counts = dict.fromkeys(self._sums, 0.0)

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None:
        for key in self._sums:
            value, count = prediction[key].double(), prediction[f"{key.rpartition('_')[0]}_count"].double()
            known = ~value.isnan()
            self._sums[key] += float((value * count)[known].sum())
            self._counts[key] += float(count[known].sum())

    def compute(self) -> dict[str, float]:
        return {f"masked_{key}": self._sums[key] / count for key, count in self._counts.items() if count}
