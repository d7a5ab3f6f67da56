"""Key tables: which tensor of a published checkpoint is which of ours.

A family is a value, one file a family group under `mmformer/checkpoints/families/`:

    def rules(described: Described) -> list[Rule]:
        theirs, ours = "encoder.layer.{i}.", "encoders.image.stages.0.layers.{i}."
        return [
            *rename("layernorm", "encoders.image.stages.0.norm"),                  # weight and bias
            *rename(theirs + "layernorm_before", ours + "attention_norm"),
            *join([theirs + f"attention.attention.{name}" for name in ("query", "key", "value")],
                  ours + "attention.qkv"),
            Rule(("embeddings.cls_token",), ("encoders.image.embedder.class_tokens",), Reshaped((1, 1, -1), (1, -1))),
        ]

    VIT = Family(
        name="vit", library="transformers", matches=matches, describe=describe, rules=rules,
        ignored={"pooler.*": "the model described has no pooler"},
    )

What no rule consumes must match `ignored`, what no rule fills must match `zeros` or `configured`; anything else is an
error that names it. A rule whose sources the file lacks, or whose targets the model lacks, does not apply, so layouts
of several versions stand side by side in one table; the first rule to claim a name has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmformer.checkpoints.changes import Change, Joined, Same
from mmformer.checkpoints.source import Source

ZERO = "ZERO"
"""A source that the original lacks by design, in the place of a name: the key bias of Whisper."""

CONFIGURED = ("*.normalize.mean", "*.normalize.std")
"""Targets that a config decides and that files of other libraries do not hold."""

Names = tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """These tensors of the file become those of the model.

    A name may hold layer numbers as `{i}`, `{j}`; all names of a rule hold the same ones.

    Raises:
        ValueError: names with different holes.
    """

    sources: Names
    targets: Names
    change: Change = field(default_factory=Same)

    def __post_init__(self) -> None:
        holes = {name: frozenset(re.findall(r"{(\w+)}", name)) for name in (*self.sources, *self.targets)}
        holes.pop(ZERO, None)
        if len(set(holes.values())) > 1:
            raise ValueError(f"the names of a rule hold different layer numbers: {', '.join(holes)}")

    def at(self, numbers: Mapping[str, str]) -> Rule:
        """The rule with numbers in the holes."""
        fill = [tuple(_fill(name, numbers) for name in names) for names in (self.sources, self.targets)]
        return Rule(fill[0], fill[1], self.change)


def rename(source: str, target: str, change: Change | None = None, bias: bool = True) -> list[Rule]:
    """The weight and, with `bias`, the bias of one layer."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Rule((f"{source}.{kind}",), (f"{target}.{kind}",), change or Same()) for kind in kinds]


def join(sources: Sequence[str], target: str, parts: tuple[int, ...] = (), bias: bool = True) -> list[Rule]:
    """Weights and biases of several layers along their first axis: queries, keys and values to our `qkv`.

    `parts` are their proportions, equal where not given. A source may be `ZERO`.
    """
    change = Joined(parts or (1,) * len(sources))
    kinds = ("weight", "bias") if bias else ("weight",)
    return [
        Rule(tuple(name if name == ZERO else f"{name}.{kind}" for name in sources), (f"{target}.{kind}",), change)
        for kind in kinds
    ]


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a checkpoint's own config says, in our terms.

    `model` is the plain config of a whole `mmformer.model.Model`, `objectives` those of objectives by name: rules call
    their tensors `objectives.<name>.*`. `features` reads raw items as the model was trained to; `layout` is for the
    family's own `rules` (a prefix, say); `ignored` adds to the family's, `new` are patterns of targets that the file
    has not, as options ask for something else.
    """

    model: dict[str, Any]
    objectives: dict[str, dict[str, Any]] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    layout: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    new: Names = ()


@dataclass(frozen=True, kw_only=True)
class Written:
    """A model in the terms of a family: its config file, side files by name, and the layout that `rules` need."""

    config: dict[str, Any]
    layout: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The checkpoints of one model class in one library's layout.

    `describe(source, options)` raises a ValueError that names what the file does not say and `options` must.
    `options` are the names it takes. `ignored` maps patterns of source names to the reason; they apply only to what no
    rule consumes. `write` is the inverse of `describe`: from the plain config of a model, or of some parts of one, it
    makes what the library is to read; its second argument is what that was, for a model that came from this family. A
    ValueError says what the family cannot hold.
    """

    name: str
    library: str
    matches: Callable[[Source], bool]
    describe: Callable[[Source, Mapping[str, Any]], Described]
    rules: Callable[[Described], list[Rule]]
    ignored: Mapping[str, str] = field(default_factory=dict)
    zeros: Names = ()
    configured: Names = CONFIGURED
    options: Names = ()
    write: Callable[[Mapping[str, Any], Written | None], Written] | None = None


def expand(rules: Iterable[Rule], sources: Iterable[str], targets: Iterable[str]) -> list[Rule]:
    """The rules with every layer number that occurs among the names; those that concern none of them are left out."""
    sources, targets = set(sources), set(targets)
    concrete = []
    for rule in rules:
        found = {}  # in the order of the names, without repetition
        for names, pool in ((rule.sources, sources), (rule.targets, targets)):
            for name in names:
                found |= dict.fromkeys(_numbers(name, pool))
        concrete += [rule.at(dict(numbers)) for numbers in sorted(found, key=_by_value)]
    return concrete


def _numbers(name: str, pool: set[str]) -> list[tuple[tuple[str, str], ...]]:
    """The numbers in the holes of a name for which the pool has it."""
    if "{" not in name:
        return [()] if name in pool else []
    pattern = _pattern(name)
    return [tuple(sorted(match.groupdict().items())) for match in map(pattern.fullmatch, pool) if match]


def _by_value(numbers: tuple[tuple[str, str], ...]) -> list[int]:
    return [int(value) for _, value in numbers]


@lru_cache(maxsize=4096)
def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"{(\w+)}", name)
    seen: set[str] = set()
    regex = ""
    for place, part in enumerate(parts):
        if place % 2 == 0:
            regex += re.escape(part)
        else:
            regex += f"(?P={part})" if part in seen else rf"(?P<{part}>\d+)"
            seen.add(part)
    return re.compile(regex)


def _fill(name: str, numbers: Mapping[str, str]) -> str:
    for hole, number in numbers.items():
        name = name.replace(f"{{{hole}}}", number)
    return name
