"""Which parameters of a model train, and from when on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Schedule:
    """The names of a model's parameters that never train, and of those that train from a global step on."""

    never: frozenset[str] = frozenset()
    later: tuple[tuple[int, frozenset[str]], ...] = ()

    def stage(self, step: int) -> int:
        """How many of the later groups train at a step."""
        return sum(start <= step for start, _ in self.later)

    @property
    def last(self) -> int:
        return len(self.later)

    def set(self, model: nn.Module, stage: int) -> None:
        """Let what the schedule names require gradients or not, as at a stage; the rest of the model is left alone."""
        waiting = [names for _, names in self.later[stage:]]
        frozen = self.never.union(*waiting)
        scheduled = self.never.union(*(names for _, names in self.later))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in scheduled:
            parameters[name].requires_grad_(name not in frozen)


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """What trains of a model whose weights were loaded; patterns are of parameter names, such as "encoders.image.*".

    `freeze` are not trained, except those that match `train`. Each of `unfreeze`, `{step: .., patterns: [..]}`, lets
    frozen ones train from that global step on. `adapters` adds small trainable parts to a model (`Lora`).

    Raises:
        ValueError: a step that is not positive, or an entry of `unfreeze` without step and patterns.
    """

    freeze: Sequence[str]
    train: Sequence[str]
    unfreeze: Sequence[Mapping[str, Any]]
    adapters: Callable[[nn.Module], Any] | None

    def __post_init__(self) -> None:
        for entry in self.unfreeze:
            if set(entry) != {"step", "patterns"} or entry["step"] < 1:
                raise ValueError(
                    f"unfreeze has {dict(entry)}: write {{step: 500, patterns: [encoders.image.*]}}, the step above 0"
                )

    def apply(self, model: nn.Module) -> Schedule:
        """Freeze and adapt a model for its first step; gives back what is to happen at later ones.

        Raises:
            ValueError: a pattern that matches nothing, or one to unfreeze what is not frozen.
        """
        frozen = matching(model, self.freeze, "freeze") - matching(model, self.train, "train")
        later: list[tuple[int, set[nn.Parameter]]] = []
        for entry in sorted(self.unfreeze, key=lambda entry: entry["step"]):
            chosen = matching(model, entry["patterns"], "unfreeze") & frozen
            if not chosen:
                raise ValueError(f"unfreeze at step {entry['step']}: {list(entry['patterns'])} are not frozen by then")
            later.append((entry["step"], chosen))
            frozen -= chosen
        trained = {p: p.requires_grad for p in model.parameters()}
        if self.adapters is not None:
            self.adapters(model)  # which freezes all others
        for parameter, before in trained.items():
            parameter.requires_grad_(before and parameter not in frozen)
        schedule = Schedule(
            frozenset(_names(model, frozen)), tuple((step, frozenset(_names(model, chosen))) for step, chosen in later)
        )
        schedule.set(model, 0)
        return schedule


def matching(model: nn.Module, patterns: Iterable[str], what: str) -> set[nn.Parameter]:
    """The parameters that have a name of which a pattern holds.

    Raises:
        ValueError: a pattern that matches no parameter; `what` says in the message what it was for.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    out: set[nn.Parameter] = set()
    for pattern in patterns:
        found = {parameter for name, parameter in named if fnmatchcase(name, pattern)}
        if not found:
            shown = ", ".join(list(dict.fromkeys(_part(name) for name, _ in named))[:12])
            raise ValueError(f"{what} pattern {pattern!r} matches no parameter; the model has {shown}")
        out |= found
    return out


def rest(module: nn.Module) -> None:
    """Put each part whose parameters are all frozen into evaluation mode: no dropout, no new statistics of norms."""
    trains = [parameter.requires_grad for parameter in module.parameters()]
    if trains and not any(trains):
        module.eval()
        return
    for child in module.children():
        rest(child)


def _names(model: nn.Module, chosen: set[nn.Parameter]) -> list[str]:
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter in chosen]


def _part(name: str) -> str:
    return ".".join(name.split(".")[:2]) + ".*"
