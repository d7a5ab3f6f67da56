"""Splits of a data set as loaders that go on exactly where a killed run stopped."""

from __future__ import annotations

import atexit
import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from mmformer.batch import Batch
from mmformer.datasets import blackbox
from mmformer.datasets.augment import Augment
from mmformer.datasets.dataset import ManifestDataset
from mmformer.datasets.features import Feature
from mmformer.datasets.labels import Kind, Target
from mmformer.datasets.manifest import Manifest, read_manifest
from mmformer.datasets.sampler import Batching, BatchSampler
from mmformer.datasets.splits import SPLITS
from mmformer.datasets.tokenizers import Tokenizer
from mmformer.datasets.watchdog import watched


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """How batches are made: how large (over all processes), and by how many worker processes.

    `timeout` is in seconds: a worker that hangs in a decoder ends the run with a message instead of silence. With a
    `decode_timeout` in seconds, files are decoded in processes of their own: one that takes longer, or crashes, costs
    no more than its item; None decodes in the worker itself.

    Raises:
        ValueError: a `decode_timeout` that the worker's `timeout` does not leave room for.
    """

    batch_size: int | None
    batch_tokens: int | None
    eval_batch_size: int
    num_workers: int
    timeout: int
    decode_timeout: float | None
    pin_memory: bool

    def __post_init__(self) -> None:
        if self.decode_timeout is not None and self.num_workers and self.timeout <= self.decode_timeout:
            raise ValueError(
                f"data.loader.timeout={self.timeout} would end the run before data.decode_timeout={self.decode_timeout}"
                " ends the decoder: raise the first to several times the second"
            )

    def batching(self, split: str, seed: int) -> Batching:
        train = split == "train"
        return Batching(
            seed=seed,
            batch_size=self.batch_size if train else self.eval_batch_size,
            batch_tokens=self.batch_tokens if train else None,
            shuffle=train,
            drop_last=train,
        )


class Split(Protocol):
    """The samples of a split; a key is (epoch, index), all that the augmentation of a sample depends on."""

    def __len__(self) -> int: ...
    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch: ...
    def num_tokens(self) -> list[int]: ...


_WORKERS: WeakSet[Any] = WeakSet()
_GRACE = 2.0


class Loader(DataLoader):
    """Says to Lightning that it can resume; its place is kept by the data module, which knows what was trained on."""

    boxes: Sequence[mmap.mmap] = ()

    def __iter__(self) -> Any:
        batches = super().__iter__()
        can_wait = self.timeout and threading.current_thread() is threading.main_thread()
        return _InTime(batches, self.timeout) if can_wait and hasattr(signal, "setitimer") else batches

    def _get_iterator(self) -> Any:
        iterator = super()._get_iterator()
        workers = getattr(iterator, "_workers", ())
        _WORKERS.update(workers)
        blackbox.assign(workers, self.boxes)
        return iterator

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The sampler has been set by `Loaders.load_state_dict`."""


class _InTime:
    """Batches, each of which comes within `seconds` or is given up.

    PyTorch's own timeout does not see all of it: a tensor is handed over by a thread of the worker, which a decoder
    that holds the interpreter's lock stops too, and that is waited for without end.
    """

    def __init__(self, batches: Iterator[Any], seconds: float | int):
        self._batches, self._seconds = batches, seconds

    def __iter__(self) -> _InTime:
        return self

    def __next__(self) -> Any:
        handler = signal.signal(signal.SIGALRM, self._give_up)
        left, every = signal.setitimer(signal.ITIMER_REAL, self._seconds + _GRACE)
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" in str(error):  # the handler of SIGCHLD would raise the same once more, anywhere
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, left, every)  # whoever else waits has to wait a little longer
            signal.signal(signal.SIGALRM, handler)

    def _give_up(self, *_: Any) -> None:
        raise RuntimeError(f"DataLoader timed out after {self._seconds:g} seconds")


class Loaders(pl.LightningDataModule):
    """Loaders over splits that a subclass makes in `setup`.

    The place in the data is (epoch, batch): with the seed it decides everything that comes after, so it is all that
    a checkpoint holds, and the number of workers may change.
    """

    def __init__(self, loading: Loading, seed: int) -> None:
        super().__init__()
        self.loading = loading
        self.seed = seed
        self.splits: dict[str, Split] = {}
        self._place = (0, 0)

    def has(self, split: str) -> bool:
        return split in self.splits

    @property
    def num_rows(self) -> int:
        return sum(len(split) for split in self.splits.values())

    def batches_per_epoch(self) -> int:
        return len(self._sampler("train"))

    def _sampler(self, split: str) -> BatchSampler:
        sizes = self.splits[split].num_tokens() if self.loading.batch_tokens or self._world()[1] > 1 else None
        rank, world_size = self._world()
        rule = self.loading.batching(split, self.seed)
        return BatchSampler(sizes or [1] * len(self.splits[split]), rule, rank, world_size)

    def _world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, split: str) -> Loader:
        sampler = self._sampler(split)
        if split == "train":
            sampler.resume_at(*self._place)
            self._place = (0, 0)
        workers = self.loading.num_workers
        boxes = blackbox.boxes(workers)
        loader = Loader(
            self.splits[split],  # pyright: ignore[reportArgumentType]
            batch_sampler=sampler,
            collate_fn=_same,
            num_workers=workers,
            persistent_workers=workers > 0,
            timeout=self.loading.timeout if workers else 0,
            pin_memory=self.loading.pin_memory,
            worker_init_fn=partial(_begin, boxes),
        )
        loader.boxes = boxes
        return loader

    def train_dataloader(self) -> Loader:
        return self._loader("train")

    def val_dataloader(self) -> Loader | list[Loader]:
        return self._loader("val") if self.has("val") else []

    def test_dataloader(self) -> Loader:
        return self._loader("test")

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        loop: Any = self.trainer.fit_loop
        return {"epoch": loop.epoch_progress.current.processed, "batch": loop.epoch_loop.batch_progress.current.ready}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._place = (state_dict["epoch"], state_dict["batch"])


def _same(batch: Any) -> Batch:
    return batch


def _begin(boxes: Sequence[mmap.mmap], worker: int) -> None:
    if boxes:
        blackbox.carry(boxes[worker])
    _start_worker(worker)


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal, and a scheduler's SIGTERM every one of the job; the main one
    # decides, and still needs its workers to finish a step.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


@atexit.register
def _kill_workers() -> None:
    """At the end of the main process, end workers that hang in a decoder: they do not listen to SIGTERM.

    Registered behind multiprocessing's own, so that it comes before: that one waits for its children to end.
    """
    for process in multiprocessing.active_children():
        if process in _WORKERS:
            process.kill()


def _end_with_parent() -> None:
    """End this worker when its parent is gone, however that ended and whatever the worker is doing.

    PyTorch's worker looks for its parent only between two batches and compares with the process that it has for a
    parent once it is set up: one whose parent is killed before that waits for ever, and so does one with more to hand
    over than a pipe holds, as its own copy of the reading end keeps the pipe open.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


AUTO = "auto"
"""In place of a column's name: the column that is called like what it is for, if there is one."""


def open_manifest(
    path: str, columns: Mapping[str, str | None], references: Mapping[str, str | None], **options: Any
) -> Manifest:
    """`read_manifest`; "auto" stands for a column that need not be named, and a column left out refers to none."""
    named = {role: name for role, name in columns.items() if name != AUTO}
    kept = {role: target for role, target in references.items() if columns.get(role, AUTO) is not None}
    return read_manifest(path, named, references=kept, **options)


class DataModule(Loaders):
    """The splits of a manifest.

    `features` says how the cells of each modality become tensors; a partial one is still to be given the tokenizer,
    which `tokenizer` makes of the texts that train. A modality without a column is left out. `augment` is applied to
    what trains. `targets` names further columns as targets, with their kind or null to infer it. `options` go to each
    `ManifestDataset`.
    """

    def __init__(
        self,
        manifest: Callable[[], Manifest],
        features: Mapping[str, Feature | partial[Feature]],
        tokenizer: Callable[[Iterable[str]], Tokenizer],
        augment: Augment | None,
        targets: Mapping[str, Kind | None],
        loading: Loading,
        options: Mapping[str, Any],
        seed: int,
    ) -> None:
        super().__init__(loading, seed)
        self._manifest, self._features, self._tokenizer = manifest, features, tokenizer
        self._augment, self._targets, self._options = augment, targets, options
        self.tokenizer: Tokenizer | None = None
        self.features: dict[str, Feature] = {}
        self.targets: dict[str, Target] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the manifest and make the splits that have rows; once, whatever the stage."""
        if self.splits:
            return
        manifest = self.manifest = self._manifest()
        counts = {split: int((manifest.split == code).sum()) for code, split in enumerate(SPLITS)}
        names = [name for name in self._features if name in manifest.modalities]
        if any(isinstance(self._features[name], partial) for name in names):
            self.tokenizer = self._tokenizer(_texts(manifest))
        seconds = self.loading.decode_timeout
        self.features = {name: watched(complete(self._features[name], self.tokenizer), seconds) for name in names}
        self.targets = {name: manifest.read_target(name, kind) for name, kind in self._targets.items()}
        for split in (split for split in SPLITS if counts[split]):
            augment = self._augment if split == "train" else None
            self.splits[split] = ManifestDataset(
                manifest, split, self.features, targets=self.targets, augment=augment, seed=self.seed, **self._options
            )

    def facts(self) -> dict[str, Any]:
        """What a model must know of the data, in plain values."""
        targets = ({"label": self.manifest.label} if self.manifest.label else {}) | self.targets
        label = targets.get("label")
        return {
            "modalities": list(self.features),
            **vocabulary_facts(self.tokenizer),
            "objective": label.kind if label else None,
            "num_outputs": label.num_outputs if label else None,
            "mean": label.mean if label and label.kind == "Number" else 0.0,
            "std": label.std if label and label.kind == "Number" else 1.0,
            "label_names": list(label.names) if label else None,
            "columns": {name: cells.name for name, cells in self.manifest.inputs.items()},
            "targets": {name: _describe(target) for name, target in targets.items()},
        }

    def summary(self) -> list[str]:
        """What was found, in lines for the screen."""
        rows = ", ".join(f"{split} {len(data):,}" for split, data in self.splits.items())
        label = self.manifest.label
        what = f"; label: {label.kind} ({label.num_outputs})" if label else ""
        lines = [f"data: {self.manifest.path}: rows {rows}; {', '.join(self.features)}{what}"]
        return lines + [f"data: {note}" for note in self.manifest.notes]


def vocabulary_facts(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What a model must know of the ids of texts; None for all where there are none."""
    specials = tokenizer.specials if tokenizer else None
    return {
        "vocab_size": tokenizer.vocab_size if tokenizer else None,
        "special_ids": list(specials.all) if specials else None,
        "mask_id": specials.mask if specials else None,
        "end_id": specials.end[-1] if specials and specials.end else None,
        "space_id": _space(tokenizer) if tokenizer else None,
    }


def _space(tokenizer: Tokenizer) -> int | None:
    """The id between words, of a tokenizer that has one for it and does not join it to a word."""
    one, both, other = (tokenizer.encode(text) for text in ("a", "a b", "b"))
    between = both[len(one) : len(both) - len(other)]
    return between[0] if len(between) == 1 and both == [*one, *between, *other] else None


def _texts(manifest: Manifest) -> Sequence[str]:
    """The texts that train, each distinct one once."""
    rows = manifest.rows("train").tolist()
    return list(dict.fromkeys(text for row in rows if (text := manifest.text(row))))


def complete(feature: Feature | partial[Feature], tokenizer: Tokenizer | None) -> Feature:
    """The feature, given the tokenizer if it waits for one."""
    return feature(tokenizer) if isinstance(feature, partial) else feature


def _describe(target: Target) -> dict[str, Any]:
    return {
        "kind": target.kind,
        "num_outputs": target.num_outputs,
        "names": list(target.names),
        "mean": target.mean,
        "std": target.std,
    }
