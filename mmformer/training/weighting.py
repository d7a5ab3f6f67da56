"""How much each of several objectives counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A weight that goes in a straight line from `start` to `stop` over `steps` optimizer steps, from `after` on."""

    start: float
    stop: float
    steps: int
    after: int = 0

    def __call__(self, step: int) -> float:
        done = min(max((step - self.after) / self.steps, 0.0), 1.0)
        return self.start + done * (self.stop - self.start)


class Uncertainty(nn.Module):
    """A weight learned as the precision of the task (arXiv 1705.07115): loss / variance + log(variance) / 2.

    With `squared`, for a loss that is a squared error, half of the first term (equation 7 there; 10 is for classes).
    """

    def __init__(self, variance: float = 1.0, squared: bool = False):
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor(variance).log())
        self.squared = squared

    def forward(self) -> Tensor:
        precision = (-self.log_variance).exp()
        return precision / 2 if self.squared else precision


Weight = float | int | Uncertainty | Callable[[int], float]
"""A number, a number learned, or a function of the optimizer step."""


class Weighting(nn.Module):
    """Multiplies the losses of each objective by its weight: 1 where none is given.

    Raises:
        ValueError: a weight for an objective that is not there.
    """

    def __init__(self, weights: Mapping[str, Weight], objectives: Iterable[str]):
        super().__init__()
        known = sorted(objectives)
        if unknown := sorted(set(weights) - set(known)):
            raise ValueError(f"weights for {unknown}, but the objectives are {known}")
        self.fixed = {name: weight for name, weight in weights.items() if not isinstance(weight, Uncertainty)}
        self.learned = nn.ModuleDict({name: w for name, w in weights.items() if isinstance(w, Uncertainty)})

    def forward(self, name: str, losses: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The weighted losses of one objective, and half the logarithm of its variance where that is learned."""
        if not losses:
            return {}
        if name in self.learned:
            weight = self.learned[name]
            assert isinstance(weight, Uncertainty)
            factor = weight()
            return {part: factor * loss for part, loss in losses.items()} | {"uncertainty": weight.log_variance / 2}
        weight = self.fixed.get(name, 1.0)
        factor = weight(step) if callable(weight) else weight
        return {part: factor * loss for part, loss in losses.items()}
