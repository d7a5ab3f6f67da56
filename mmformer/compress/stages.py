"""The steps that a recipe chains: each takes what the one before it made, and makes a run's folder or a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from mmformer.batch import Batch
from mmformer.checkpoints import SavedModel, load_model, save_model
from mmformer.compress import student, training, vocabulary
from mmformer.compress.costs import Cost, Operations
from mmformer.compress.criteria import Criterion, ForEverySubset, Taylor, samples
from mmformer.compress.prune import plan, prune
from mmformer.datasets.tokenizers import load_tokenizer
from mmformer.evaluate.data import Samples as Split
from mmformer.predict import find_model, load


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all stages share: the run that is compressed, its data, and where lines for the user go."""

    run: Path
    data: Path
    tell: Callable[[str], None]

    def batches(self, count: int, size: int) -> list[Batch]:
        """At least `count` real samples of the training split in batches of `size`, with their targets."""
        predictor = load(self.run)
        rows = predictor.manifest(self.data, labelled=True)
        targets = {
            name: rows.read_target(name, known["kind"], known["names"] or None)
            for name, known in predictor.targets.items()
            if name != "label" and name in rows.table.columns
        }
        split = Split(
            manifest=rows, split="train", features=predictor.features, targets=targets, batch_size=max(size, 64)
        )
        found: list[Batch] = []
        for batch in split.batches():
            found += samples([batch], size)
            if sum(map(len, found)) >= count:
                break
        return found


@runtime_checkable
class Stage(Protocol):
    """Makes a smaller or faster model of `start` in `folder`, and gives back the run or file that it made."""

    def __call__(self, work: Work, start: Path, folder: Path) -> Path: ...


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Cut heads, channels and layers until the cost is `share` of what it was; see `mmformer.compress.prune`."""

    share: float
    cost: Cost = field(default_factory=Operations)
    criterion: Criterion = field(default_factory=lambda: ForEverySubset(Taylor(squared=True)))
    layers: bool = True
    samples: int = 512
    batch_size: int = 32

    def __call__(self, work: Work, start: Path, folder: Path) -> Path:
        saved = load_model(find_model(start))
        chosen = plan(
            saved,
            work.batches(self.samples, self.batch_size),
            self.criterion,
            self.cost,
            self.share,
            layers=self.layers,
        )
        for name, kept, count in chosen.table():
            work.tell(f"  {name}: {kept} of {count}")
        work.tell(f"  {chosen.after / chosen.before:.1%} of the {chosen.unit}")
        return _save(prune(saved, chosen), folder)


@dataclass(frozen=True, kw_only=True)
class Student:
    """A student that starts from its teacher's weights: `depth` layers of a Transformer, `dim` channels of tokens."""

    depth: Mapping[str, int] = field(default_factory=dict)
    dim: int | None = None

    def __call__(self, work: Work, start: Path, folder: Path) -> Path:
        saved = load_model(find_model(start))
        if self.depth:
            saved = student.shallower(saved, self.depth)
        if self.dim is not None:
            saved = student.narrower(saved, self.dim)
        return _save(saved, folder)


@dataclass(frozen=True, kw_only=True)
class Words:
    """Words that occur less than `least` times in the samples share a row of the table."""

    least: int
    samples: int = 100_000

    def __call__(self, work: Work, start: Path, folder: Path) -> Path:
        saved = load_model(find_model(start))
        size = saved.config["facts"]["vocab_size"]
        counts = vocabulary.occurrences(work.batches(self.samples, 256), "text", size)
        return _save(vocabulary.fewer_words(saved, counts, self.least), folder)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train what there is on the run's own data, with the run as its teacher: recovery, or distillation.

    `effort` is how many steps, as a share of the run's; `steps` says it in numbers. The learning rate is `rate` times
    the run's. `temperature: null` is without a teacher. A training that was stopped goes on.
    """

    effort: float = 0.5
    steps: int | None = None
    rate: float = 0.5
    temperature: float | None = 2.0

    def __call__(self, work: Work, start: Path, folder: Path) -> Path:
        whole = training.config_of(work.run)["trainer"]["max_steps"]
        if self.steps is None and whole <= 0:
            raise ValueError(f"{work.run} was trained by epochs: give the number of steps (stages.<name>.steps=1000)")
        steps = self.steps or max(1, round(self.effort * whole))
        training.train(training.again(work.run, start, folder, steps, self.rate, self.temperature))
        return folder


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a file that runs without PyTorch, checked on real rows against the model; `int8` makes it smaller."""

    format: Literal["onnx", "pte", "pt2"] = "onnx"
    int8: bool = False
    exclude: Sequence[str] = ()

    def __call__(self, work: Work, start: Path, folder: Path) -> Path:
        from mmformer.export import Options, export, rows_of

        predictor = load(start)
        path = folder / f"model{'_int8' if self.int8 else ''}.{self.format}"
        rows = rows_of(predictor, work.data)
        export(predictor, path, rows, Options(int8=self.int8, exclude=self.exclude))
        return path


def _save(saved: SavedModel, folder: Path) -> Path:
    tokenizer = None if saved.tokenizer is None else load_tokenizer(saved.tokenizer)
    save_model(folder / "model", saved.model, saved.config, tokenizer, saved.objectives)
    return folder
