"""Conversations on disk: a JSON object a line, with turns and the pictures and sounds that they are about.

{"id": "7", "split": "train", "images": ["7.png"], "audios": [],
 "turns": [{"role": "user", "text": "What is on <image>?"}, {"role": "assistant", "text": "a red circle"}]}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from torch import Tensor

from mmformer.batch import Batch, Fault
from mmformer.datasets.augment import Augment
from mmformer.datasets.chat import Conversation, Marks, Turn, join, misfit, pieces, placeholder
from mmformer.datasets.datamodule import Loaders, Loading, complete, vocabulary_facts
from mmformer.datasets.dataset import DataError, Key, ManifestDataset
from mmformer.datasets.features import Feature
from mmformer.datasets.manifest import MODALITIES, Cells, Manifest, read_manifest, refer
from mmformer.datasets.sources import DecodeError
from mmformer.datasets.splits import SPLITS
from mmformer.datasets.tables import ManifestError, as_column, values
from mmformer.datasets.tokenizers import Tokenizer
from mmformer.datasets.watchdog import watched

MEDIA = tuple(name for name in MODALITIES if name != "text")
TURNS = "turns"


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversations:
    """The conversations of a file, checked, and where the bytes of what they are about lie.

    `manifest` has a row for each, with all its text in one cell and the first of its media. Medium k of a modality is
    row k of `media[modality]`; row i of `manifest` has those from `starts[modality][i]` to `starts[modality][i + 1]`.
    """

    manifest: Manifest
    turns: Sequence[tuple[Turn, ...]]
    media: Mapping[str, Manifest]
    starts: Mapping[str, Int[np.ndarray, " N"]]


def column(modality: str) -> str:
    """The key under which a row lists its media of a modality."""
    return f"{modality}s"


def open_conversations(path: str, references: Mapping[str, str | None], **options: Any) -> Conversations:
    """`read_conversations`, for configs, which have its defaults themselves."""
    return read_conversations(path, references, **options)


def read_conversations(
    path: str,
    references: Mapping[str, str | None] | None = None,
    split_seed: int = 0,
    allow_outside_root: bool = False,
    checksums: bool = False,
) -> Conversations:
    """Read a .jsonl or .parquet file of conversations, or a folder or .zip that holds one beside its media.

    Media are paths from the file's folder, or bytes. `references` maps a modality to `other.parquet:column`, a column
    of another table whose rows they then name by id. `checksums` as of `read_manifest`.

    Raises:
        ManifestError: no such file or column, or turns that do not fit their media; it names the line and the id.
    """
    unused = dict.fromkeys(("image", "audio", "label"))
    options = {"split_seed": split_seed, "allow_outside_root": allow_outside_root, "checksums": checksums}
    manifest = read_manifest(path, {"text": TURNS, **unused}, **options)
    table = manifest.table
    lists = {name: _lists(manifest, column(name)) for name in MEDIA if column(name) in table.columns}
    turns = [_turns(manifest, row, cell) for row, cell in enumerate(values(table.columns[TURNS]))]
    for row, said in enumerate(turns):
        conversation = Conversation(turns=said, media={name: cells[row] for name, cells in lists.items()})
        if reason := misfit(conversation, MEDIA):
            raise ManifestError(f"{_where(manifest, row)}: {reason}")
    lists = {name: cells for name, cells in lists.items() if any(cells)}
    named = {name: (references or {}).get(name) for name in lists}

    def cells_of(name: str, cells: list[Any]) -> Cells:
        held = replace(table, columns={column(name): as_column(cells)}, num_rows=len(cells))
        if (reference := named[name]) is not None:
            return refer(manifest.path, column(name), held, reference, allow_outside_root)
        return Cells(name=column(name), column=held.columns[column(name)], root=table.root)

    firsts = {name: cells_of(name, [row[0] if row else None for row in cells]) for name, cells in lists.items()}
    texts = ["\n".join(f"{turn.role}: {turn.text}" for turn in said) for said in turns]
    spoken = Cells(name=TURNS, column=as_column(texts), root=table.root)
    return Conversations(
        manifest=replace(manifest, inputs={"text": spoken, **firsts}),
        turns=turns,
        media={name: _flat(manifest, name, cells, cells_of) for name, cells in lists.items()},
        starts={name: np.cumsum([0, *map(len, cells)]) for name, cells in lists.items()},
    )


def _flat(manifest: Manifest, name: str, lists: Sequence[Sequence[Any]], cells_of: Callable[..., Cells]) -> Manifest:
    """A manifest with a row for each medium, which has the id of its conversation."""
    ids = [manifest.id(row) for row, cells in enumerate(lists) for _ in cells]
    cells = cells_of(name, [value for cells in lists for value in cells])
    split = np.zeros(len(ids), dtype=np.int64)
    return replace(manifest, ids=as_column(ids), split=split, inputs={name: cells}, label=None)


def _where(manifest: Manifest, row: int) -> str:
    """A row as one finds it in the file."""
    lines = manifest.table.lines
    place = f"line {lines[row]}" if lines else f"row {row + 1}"
    return f"{manifest.path}, {place} (id {manifest.id(row)!r})"


def _lists(manifest: Manifest, name: str) -> list[list[Any]]:
    """The media of each row."""
    found = [[] if cell is None else cell for cell in values(manifest.table.columns[name])]
    for row, cells in enumerate(found):
        if not isinstance(cells, list) or any(value is None or value == "" for value in cells):
            raise ManifestError(f"{_where(manifest, row)}: {name} is {cells!r}: give a list of paths or ids")
    return found


def _turns(manifest: Manifest, row: int, cell: Any) -> tuple[Turn, ...]:
    said = cell if isinstance(cell, list) else []
    if not said or not all(isinstance(t, Mapping) and {"role", "text"} <= t.keys() for t in said):
        raise ManifestError(
            f"{_where(manifest, row)}: turns are {cell!r}: give a list of objects with role and text, one at least"
        )
    return tuple(Turn(role=str(turn["role"]), text=str(turn["text"])) for turn in said)


class ConversationDataset:
    """The conversations of one split as batches, in which texts, pictures and sounds stand in the order of the turns.

    What cannot be read takes its whole conversation with it, and is listed in the batch's `faults`; with
    `on_error="fail"` it stops.

    Raises:
        ManifestError: the split is empty.
        DataError: a conversation that cannot be read, with `on_error="fail"`.
    """

    def __init__(
        self,
        conversations: Conversations,
        split: str | None,
        features: Mapping[str, Feature],
        marks: Marks,
        *,
        augment: Augment | None = None,
        on_error: Literal["skip", "fail"] = "skip",
        seed: int = 0,
        cache_bytes: int = 1 << 30,
    ):
        if on_error not in ("skip", "fail"):  # from a command line, where no type is checked
            raise ValueError(f"data.on_error={on_error}: give skip or fail")
        self.conversations, self.manifest = conversations, conversations.manifest
        self.rows = self.manifest.rows(split)
        self.features, self.marks = dict(features), marks
        self.augment, self.on_error, self.seed = augment, on_error, seed
        self._media = {
            name: ManifestDataset(media, None, {name: features[name]}, cache_bytes=cache_bytes)
            for name, media in conversations.media.items()
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key | int) -> Batch:
        return self.__getitems__([key if isinstance(key, tuple) else (0, key)])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The batch of these conversations; those that cannot be read are missing from it."""
        epochs = {epoch for epoch, _ in keys}
        if len(epochs) > 1:
            raise ValueError(f"a batch of the epochs {sorted(epochs)}: a batch belongs to one")
        faults: list[Fault] = []
        read: list[tuple[int, list[tuple[str, Tensor]]]] = []  # an index may come twice
        for _, index in keys:
            found = self._read(int(self.rows[index]))
            if isinstance(found, Fault):
                faults.append(self._refused(found))
            else:
                read.append((index, found))
        batch = Batch(
            ids=tuple(self.manifest.id(int(self.rows[index])) for index, _ in read),
            inputs=join([found for _, found in read], self.features),
            faults=tuple(faults),
            epoch=next(iter(epochs), 0),
            indices=tuple(index for index, _ in read),
        )
        return self.augment(batch, self.seed) if self.augment else batch

    def _read(self, row: int) -> list[tuple[str, Tensor]] | Fault:
        id, held = self.manifest.id(row), {}
        for name, media in self._media.items():
            first, last = self._span(name, row)
            held[name] = []
            for k in range(first, last):
                item = media.item(name, k)
                if not isinstance(item, Tensor):
                    where = self.conversations.media[name].where(name, k)
                    return Fault(id=id, column=column(name), path=where, reason=item or "nothing there")
                held[name].append(item)
        try:
            return pieces(Conversation(turns=self.conversations.turns[row], media=held), self.features, self.marks)
        except DecodeError as error:
            return Fault(id=id, column=TURNS, path=_where(self.manifest, row), reason=str(error))

    def _span(self, name: str, row: int) -> tuple[int, int]:
        """The media of a row."""
        starts = self.conversations.starts[name]
        return int(starts[row]), int(starts[row + 1])

    def num_tokens(self) -> list[int]:
        """About how many tokens each conversation becomes, over all modalities."""
        return self._sizes.tolist()

    @cached_property
    def _sizes(self) -> Int[np.ndarray, " n"]:
        text = self.features["text"]
        total = np.array([text.tokens(text.shape(self.manifest.text(int(row)))) for row in self.rows])
        for name, media in self._media.items():
            before = np.concatenate([[0], np.cumsum(media.num_tokens())])
            spans = np.array([self._span(name, int(row)) for row in self.rows])
            total += before[spans[:, 1]] - before[spans[:, 0]]
        return total

    def _refused(self, fault: Fault) -> Fault:
        """The fault, where the policy is to go on."""
        if self.on_error == "fail":
            raise DataError(
                f"conversation {fault.id!r}, {fault.column}, {fault.path}: {fault.reason}; mend or remove it, "
                "or leave out what is broken with data.on_error=skip"
            )
        return fault


class ConversationModule(Loaders):
    """The splits of a file of conversations.

    `features` says how texts, pictures and sounds become tensors; the one of texts is still to be given the tokenizer,
    which `tokenizer` makes of the turns that train. `marks` are the ids around turns; without, the three behind the
    tokenizer's vocabulary. `options` go to each `ConversationDataset`.
    """

    def __init__(
        self,
        conversations: Callable[[], Conversations],
        features: Mapping[str, Feature | partial[Feature]],
        tokenizer: Callable[[Iterable[str]], Tokenizer],
        augment: Augment | None,
        marks: Mapping[str, int] | None,
        loading: Loading,
        options: Mapping[str, Any],
        seed: int,
    ) -> None:
        super().__init__(loading, seed)
        self._conversations, self._features, self._tokenizer = conversations, features, tokenizer
        self._augment, self._marks, self._options = augment, marks, options
        self.tokenizer: Tokenizer | None = None
        self.features: dict[str, Feature] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and check the conversations and make the splits that have any; once, whatever the stage.

        Raises:
            ManifestError: conversations about something that has no feature.
        """
        if self.splits:
            return
        found = self._conversations()
        self.manifest = found.manifest
        if lacking := sorted(set(found.media) - set(self._features)):
            raise ManifestError(f"{found.manifest.path} has {column(lacking[0])}: give data.features.{lacking[0]}")
        train = found.manifest.rows("train").tolist()
        tokenizer = self.tokenizer = self._tokenizer(_spoken(found.turns[row] for row in train))
        names = [name for name in self._features if name == "text" or name in found.media]
        seconds = self.loading.decode_timeout
        self.features = {name: watched(complete(self._features[name], tokenizer), seconds) for name in names}
        self.marks = Marks(**self._marks) if self._marks else Marks.behind(tokenizer.vocab_size)
        for code, split in enumerate(SPLITS):
            if (found.manifest.split == code).any():
                augment = self._augment if split == "train" else None
                self.splits[split] = ConversationDataset(
                    found, split, self.features, self.marks, augment=augment, seed=self.seed, **self._options
                )

    def facts(self) -> dict[str, Any]:
        """What a model must know of the data, in plain values; `chat` are the ids around turns."""
        marks = {"user": self.marks.user, "assistant": self.marks.assistant, "end": self.marks.end}
        known = vocabulary_facts(self.tokenizer)
        return known | {
            "modalities": list(self.features),
            "vocab_size": max(known["vocab_size"], *(i + 1 for i in marks.values())),
            "special_ids": sorted({*known["special_ids"], *marks.values()}),
            "chat": marks,
            "objective": None,
            "num_outputs": None,
            "mean": 0.0,
            "std": 1.0,
            "label_names": None,
            "columns": {name: cells.name for name, cells in self.manifest.inputs.items()},
            "targets": {},
        }

    def summary(self) -> list[str]:
        """What was found, in lines for the screen."""
        rows = ", ".join(f"{split} {len(data):,}" for split, data in self.splits.items())
        lines = [f"data: {self.manifest.path}: conversations {rows}; {', '.join(self.features)}"]
        return lines + [f"data: {note}" for note in self.manifest.notes if not note.startswith("columns not used")]


def _spoken(conversations: Iterable[Sequence[Turn]]) -> list[str]:
    """The texts of turns without their placeholders, each distinct one once."""
    found: dict[str, None] = {}
    for turns in conversations:
        for turn in turns:
            text = turn.text
            for name in MEDIA:
                text = text.replace(placeholder(name), " ")
            found[text] = None
    return list(found)
