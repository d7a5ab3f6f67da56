"""From key tables to copies: everything is matched and checked by shape before the first number moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from mmformer.checkpoints.report import Item, Line, Report, short
from mmformer.checkpoints.store import TensorStore
from mmformer.checkpoints.table import CONFIGURED, ZERO, Rule, expand

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that convert into one another; 8-bit ones carry a scale of their own and do not."""

Names = Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What may happen besides the rules: reasons by pattern of a source's name, and patterns of targets' names.

    `new` targets stay as they were initialised, whatever the file has for them. Without `resize` a tensor of another
    size is a mismatch. `part` names the part of the described model that is filled: rules that lead elsewhere leave
    their sources ignored.
    """

    ignored: Mapping[str, str]
    zeros: Names = ()
    configured: Names = CONFIGURED
    new: Names = ()
    resize: bool = True
    part: str | None = None


@dataclass(frozen=True)
class Plan:
    """What to copy, what to set to zero, and the account of it; `moves` have no holes in their names."""

    moves: tuple[Rule, ...]
    zeros: tuple[str, ...]
    report: Report

    def carry_out(self, store: TensorStore, targets: Mapping[str, Tensor]) -> None:
        """Read each tensor, change it and write it into its target, one rule after the other."""
        with torch.no_grad():
            for rule in self.moves:
                given = tuple(None if name == ZERO else store[name] for name in rule.sources)
                for name, tensor in zip(rule.targets, rule.change.load(given), strict=True):
                    if (target := targets.get(name)) is not None:  # another part of the model has it otherwise
                        fits = tensor.shape == target.shape
                        target.copy_(tensor if fits else rule.change.resize(tensor, target))
            for name in self.zeros:
                targets[name].zero_()


def plan(origin: str, store: TensorStore, targets: Mapping[str, Tensor], rules: Iterable[Rule], terms: Terms) -> Plan:
    """Match a file with a model's tensors and check every one of them, reading nothing but shapes.

    Only where the model holds one tensor under two names and the file has both are their numbers compared.
    """
    return _Planner(store, targets, terms).plan(origin, list(rules))


class _Planner:
    """The state of one matching: which names are taken, and the lines so far."""

    def __init__(self, store: TensorStore, targets: Mapping[str, Tensor], terms: Terms):
        self.store, self.targets, self.terms = store, targets, terms
        self.lines: list[Line] = []
        self.moves: list[Rule] = []
        self.sources: set[str] = set()
        self.filled: set[str] = set()
        self.aside: dict[str, str] = {}  # sources of rules that are not for this load, and why
        self.notes: dict[str, str] = {}  # why a rule could not take a name, for the lines of what is left

    def plan(self, origin: str, rules: list[Rule]) -> Plan:
        for rule in expand(rules, self.store, self.targets):
            self._apply(rule)
        self._compare_tied()
        self._share_tied()
        zeros = [name for name in self._unfilled() if _matches(name, self.terms.zeros)]
        self._leave_targets()
        self._leave_sources()
        return Plan(tuple(self.moves), tuple(zeros), Report(origin, tuple(self.lines)))

    def _apply(self, rule: Rule) -> None:
        sources = [name for name in rule.sources if name != ZERO]
        if reason := self._aside(rule):
            self.aside |= {name: reason for name in sources if name not in self.aside}
            return
        if self.sources & set(sources) or self.filled & set(rule.targets):
            return
        lacking = [name for name in sources if name not in self.store]
        absent = [name for name in rule.targets if name not in self.targets and self._ours(name)]
        if lacking or absent:
            verb = "comes from" if len(lacking) == len(sources) else "needs"
            for name in rule.targets if lacking else ():
                self.notes.setdefault(name, f"{verb} {', '.join(lacking)}, which the file lacks")
            for name in sources if absent else ():
                self.notes.setdefault(name, f"goes to {', '.join(absent)}, which the model lacks")
            return
        line = self._judge(rule, sources)
        self.lines.append(line)
        self.sources |= set(sources)
        self.filled |= set(rule.targets)
        if line.status != "mismatched":
            self.moves.append(rule)

    def _aside(self, rule: Rule) -> str | None:
        """Why a rule is not for this load, where it is not."""
        if not any(map(self._ours, rule.targets)):
            return "belongs to another part"
        if all(name.startswith("objectives.") and name not in self.targets for name in rule.targets):
            return "belongs to an objective"
        if any(_matches(name, self.terms.new) for name in rule.targets):
            return f"{', '.join(rule.targets)} stays new"
        return None

    def _ours(self, name: str) -> bool:
        return self.terms.part is None or name.startswith(f"{self.terms.part}.")

    def _judge(self, rule: Rule, sources: list[str]) -> Line:
        """The line of a rule whose tensors are all there."""
        wanted = [(name, self.targets[name]) for name in rule.targets if name in self.targets]
        sides = tuple(map(self._source, sources)), tuple(_item(*pair) for pair in wanted)
        wrong = [
            f"{short(source.dtype)} in the file, {short(target.dtype)} in the model"
            for source in sides[0]
            for target in sides[1]
            if not _converts(source.dtype, target.dtype)
        ]
        if wrong:
            return Line("mismatched", *sides, note=wrong[0])
        try:
            made = dict(zip(rule.targets, rule.change.load(self._shapes(rule)), strict=True))
            resized = [self._fit(rule, made[name], target) for name, target in wanted]
        except (ValueError, RuntimeError, IndexError) as error:  # what torch raises of shapes that do not go together
            return Line("mismatched", *sides, note=str(error).splitlines()[0])
        if any(resized):
            return Line("resized", *sides, note="; ".join(filter(None, resized)))
        verb = "loaded" if rule.change.verb == "renamed" and rule.sources == rule.targets else rule.change.verb
        return Line(verb, *sides)

    def _shapes(self, rule: Rule) -> tuple[Tensor | None, ...]:
        """The sources of a rule without their numbers."""
        return tuple(
            None if name == ZERO else torch.empty(self.store.shape(name), dtype=self.store.dtype(name), device="meta")
            for name in rule.sources
        )

    def _fit(self, rule: Rule, made: Tensor, target: Tensor) -> str:
        """What to say of a tensor that is resized; "" for one that fits as it is."""
        if made.shape == target.shape:
            return ""
        change = f"{_size(made)} to {_size(target)}"
        if made.ndim == 2 and made.shape == target.shape[::-1]:
            raise ValueError(f"{change}: stored transposed, which its table does not say")
        try:
            resized = rule.change.resize(made, torch.empty(target.shape, dtype=target.dtype, device="meta"))
        except ValueError as error:
            raise ValueError(f"{change}: {error}") from error
        if resized.shape != target.shape:
            raise ValueError(f"{change}: resized to {_size(resized)}")
        if not self.terms.resize:
            raise ValueError(f"{change}: would be resized, and resize is off")
        return change

    def _twins(self) -> list[list[str]]:
        """Names of the model that share one tensor."""
        groups: dict[int, list[str]] = {}
        for name, tensor in self.targets.items():
            groups.setdefault(id(tensor), []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    def _compare_tied(self) -> None:
        """Of a tensor that the file holds twice and the model once, both copies must be equal."""
        rules = {name: rule for rule in self.moves for name in rule.targets}
        for names in self._twins():
            filled = [name for name in names if name in rules]
            values = [self._value(rules[name], name) for name in filled]
            for name, value in zip(filled[1:], values[1:], strict=True):
                if rules[name] is rules[filled[0]]:
                    continue  # one tensor of the file for both
                same = torch.equal(value, values[0])
                note = f"the model ties this to {filled[0]}" + ("" if same else ", but the file holds two that differ")
                place = next(i for i, line in enumerate(self.lines) if name in [item.name for item in line.targets])
                self.lines[place] = replace(self.lines[place], status="tied" if same else "mismatched", note=note)
                self.moves.remove(rules[name])

    def _value(self, rule: Rule, name: str) -> Tensor:
        given = tuple(None if source == ZERO else self.store[source] for source in rule.sources)
        return dict(zip(rule.targets, rule.change.load(given), strict=True))[name].to(self.targets[name].dtype)

    def _share_tied(self) -> None:
        """A name whose tensor was filled under another name needs nothing more."""
        for names in self._twins():
            filled = [name for name in names if name in self.filled]
            for name in names:
                if filled and name not in self.filled:
                    item = _item(name, self.targets[name])
                    self.lines.append(Line("tied", (), (item,), f"one tensor with {filled[0]}"))
                    self.filled.add(name)

    def _unfilled(self) -> list[str]:
        return [name for name in self.targets if name not in self.filled]

    def _leave_targets(self) -> None:
        kinds = {"zero-filled": self.terms.zeros, "configured": self.terms.configured, "new": self.terms.new}
        for name in self._unfilled():
            status = next((kind for kind, patterns in kinds.items() if _matches(name, patterns)), "missing")
            note = self.notes.get(name, "") if status == "missing" else ""
            self.lines.append(Line(status, (), (_item(name, self.targets[name]),), note))

    def _leave_sources(self) -> None:
        for name in self.store:
            if name in self.sources:
                continue
            reasons = (reason for pattern, reason in self.terms.ignored.items() if fnmatchcase(name, pattern))
            reason = self.aside.get(name) or next(reasons, None)
            line = Line("ignored", note=reason) if reason else Line("unexpected", note=self.notes.get(name, ""))
            self.lines.append(replace(line, sources=(self._source(name),)))

    def _source(self, name: str) -> Item:
        return Item(name, self.store.shape(name), self.store.dtype(name))


def original(tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """The tensors of a model under the names and shapes of the original: a key table read from right to left.

    Raises:
        ValueError: a model that the original cannot hold, such as a key bias where it has none.
    """
    made: dict[str, Tensor] = {}
    done: set[str] = set()
    for rule in expand(rules, (), tensors):
        if done & set(rule.targets) or not set(rule.targets) <= set(tensors):
            continue
        done |= set(rule.targets)
        saved = rule.change.save(tuple(tensors[name].detach() for name in rule.targets))
        for name, tensor in zip(rule.sources, saved, strict=True):
            if name != ZERO:
                made[name] = tensor.contiguous()
            elif tensor.any():
                raise ValueError(f"{rule.targets[0]} was trained where {rule.sources} has nothing: it cannot go back")
    return made


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _item(name: str, tensor: Tensor) -> Item:
    return Item(name, tuple(tensor.shape), tensor.dtype)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _converts(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether numbers of one type may become the other: floats among themselves, integers where none is lost."""
    if source == target or (source in FLOATS and target in FLOATS):
        return True
    return not target.is_floating_point and torch.promote_types(source, target) == target
