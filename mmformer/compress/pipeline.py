"""A recipe from end to end: each stage once, whatever stops it in between, then all of them measured together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmformer.checkpoints.folder import SUMS
from mmformer.compress.measure import Measured, data_of, first_run, measure, rows_to_judge
from mmformer.compress.opened import open_any
from mmformer.compress.page import write_page
from mmformer.compress.stages import Export, Stage, Work
from mmformer.predict import find_model

DONE, SUMMARY = "stage.json", "compress.json"


class TooLossy(ValueError):
    """What a recipe made loses more than it may; the message has the figures."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages by name, in order, and what they may cost.

    `most_lost` is the largest drop of the metric on rows as they are (in points of 1: 0.01 is one percent), and
    `most_lost_of_a_subset` that of any subset of the modalities; None for no limit.
    """

    stages: Mapping[str, Stage]
    most_lost: float | None = None
    most_lost_of_a_subset: float | None = None


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What came of a recipe: the figures of the run and of each stage, and the winner among those within its limits."""

    measured: Sequence[Measured]
    winner: Measured
    page: Path


def read_recipe(name: str, overrides: Sequence[str] = ()) -> tuple[Recipe, dict[str, Any]]:
    """A recipe that comes with mmformer, or the YAML file of one, with values overridden (`stages.recover.steps=300`).

    Raises:
        ValueError: no such recipe, an override of what it does not have, or a part that does not take its arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = files("mmformer.compress").joinpath("recipes")
    known = sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    own = Path(name)
    if own.suffix not in (".yaml", ".yml") and name not in known:
        raise ValueError(f"no recipe {name!r}: there are {', '.join(known)}, or give the path of your own .yaml")
    text = own.read_text(encoding="utf-8") if name not in known else folder.joinpath(f"{name}.yaml").read_text("utf-8")
    try:
        config = OmegaConf.create(text)
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or OmegaConf.select(config, key.rpartition(".")[0] or key) is None:
                raise ValueError(
                    f"recipe {name} has nothing to override by {override!r}: write stages.<name>.<key>=value"
                )
            OmegaConf.update(config, key, OmegaConf.create(f"value: {value}").value)
        plain: Any = OmegaConf.to_container(config, resolve=True)
        made = instantiate(plain, _convert_="all")
    except (InstantiationException, OmegaConfBaseException) as error:
        raise ValueError(f"recipe {name}: {' '.join(str(error.__cause__ or error).split())}") from error
    return Recipe(**made), plain


def compress(
    run: Path,
    recipe: Recipe,
    folder: Path,
    data: Path | None = None,
    *,
    rows: int = 1000,
    rounds: int = 60,
    tell: Callable[[str], None] = print,
) -> Compressed:
    """Run the stages of a recipe on a run, each in a folder of its own, and measure what they made beside it.

    A stage that was finished before with the same settings, on what it is to start from now, is not run again.

    Raises:
        TooLossy: the last stage loses more than the recipe allows.
        ValueError: a stage that cannot work on this run.
    """
    run = run.resolve()
    work = Work(run=run, data=data or data_of(run), tell=tell)
    made, start, key = [run], run, f"{run} {(find_model(run) / SUMS).read_text(encoding='utf-8')}"
    for number, (name, stage) in enumerate(recipe.stages.items(), 1):
        key = sha256(f"{key}\n{stage!r}".encode()).hexdigest()
        start = _stage(work, stage, start, folder / f"{number}_{name}", key)
        made.append(start)
    subjects = [open_any(path) for path in made]
    predictor = first_run(subjects)
    assert predictor is not None
    chosen = rows_to_judge(predictor, work.data, count=rows)
    names = ["run", *recipe.stages]
    measured = [_named(one, name) for one, name in zip(measure(subjects, chosen, rounds), names, strict=True)]
    winner = best(measured, recipe)
    summary = {"run": str(run), "stages": {n: str(p) for n, p in zip(names, made, strict=True)}, "winner": winner.name}
    summary["measured"] = [one.plain() for one in measured]
    _write(folder / SUMMARY, summary)
    page = write_page(folder / "compress.html", measured, winner.name)
    if winner is measured[0]:
        tell("no stage is faster within the limits: the run itself is the best")
    elif made[names.index(winner.name)].is_dir():
        exported = Export()(work, made[names.index(winner.name)], folder / "winner")
        tell(f"the best is {winner.name}, exported to {exported}")
    _check(measured[0], measured[-1], recipe)
    return Compressed(measured=measured, winner=winner, page=page)


def best(measured: Sequence[Measured], recipe: Recipe) -> Measured:
    """The fastest at one sample a call that loses no more than the recipe allows; the first of all if none does."""
    good = [one for one in measured if not complaints(measured[0], one, recipe)]
    return min(good or measured[:1], key=lambda one: one.times[1].p50)


def complaints(first: Measured, other: Measured, recipe: Recipe) -> list[str]:
    """Where it loses more than the recipe allows, with the figures."""
    sign = -1 if first.metric == "mae" else 1
    found = []
    for letters, before in first.accuracy.items():
        most = recipe.most_lost_of_a_subset if letters else recipe.most_lost
        lost = sign * (before - other.accuracy.get(letters, float("nan")))
        if most is not None and not lost <= most:
            shown = f"{first.metric}{letters and '_' + letters}"
            found.append(f"{shown} {before:.4f} -> {other.accuracy.get(letters, float('nan')):.4f} (at most {most:g})")
    return found


def _check(first: Measured, last: Measured, recipe: Recipe) -> None:
    if wrong := complaints(first, last, recipe):
        raise TooLossy(
            f"{last.name} loses more than the recipe allows: {'; '.join(wrong)}. Cut less, train longer, or allow more "
            "(most_lost=...)"
        )


def _stage(work: Work, stage: Stage, start: Path, folder: Path, key: str) -> Path:
    """Run one stage, unless it was finished under this key."""
    mark = folder / DONE
    if mark.is_file():
        held = json.loads(mark.read_text(encoding="utf-8"))
        if held["key"] == key and Path(held["made"]).exists():
            work.tell(f"{folder.name}: done before")
            return Path(held["made"])
    begun = folder / "begun.json"
    if begun.is_file() and json.loads(begun.read_text(encoding="utf-8"))["key"] != key:
        _clear(folder)
    mark.unlink(missing_ok=True)
    _write(begun, {"key": key})
    work.tell(f"{folder.name}: {type(stage).__name__}")
    made = stage(work, start, folder)
    _write(mark, {"key": key, "made": str(made.resolve()), "stage": repr(stage)})
    return made


def _clear(folder: Path) -> None:
    """Take away what the stage left under other settings: its checkpoints would be gone on from."""
    shutil.rmtree(folder)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    temporary.replace(path)


def _named(measured: Measured, name: str) -> Measured:
    return replace(measured, name=name)
