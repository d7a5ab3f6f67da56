"""Parts of a model from runs of one's own: `grafts=[{path: runs/clip/.., part: encoders.image}]`.

Where one model is made of several that were trained before, such as BLIP-2's second stage: the queries of its first,
and a language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mmformer.checkpoints.load import describe, recognise
from mmformer.checkpoints.source import open_source
from mmformer.run.launch import UserError

OWN = "mmformer"


@dataclass(frozen=True, kw_only=True)
class Graft:
    """Which `part` of the model in `path` becomes the part called `into`, by default that of the same name."""

    path: str
    part: str
    into: str | None = None

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors of the part, named as within it.

        Raises:
            UserError: no run of one's own, or one without that part.
        """
        try:
            source, family = recognise(open_source(self.path))
            described = describe(family, source, {})
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"grafts: {self.path}: {error}") from error
        if family.library != OWN:
            raise UserError(f"grafts: {self.path} is {family.library}/{family.name}: name a run, or convert it first")
        start = f"{self.part}."
        found = {
            target.removeprefix(start): source.tensors[rule.sources[0]]
            for rule in family.rules(described)
            for target in rule.targets
            if target.startswith(start)
        }
        if not found:
            raise UserError(f"grafts: {self.path} has no {self.part}")
        return found


def graft(model: nn.Module, grafts: Sequence[Graft]) -> Iterator[str]:
    """Fill parts of a model, each of them whole; yields what to say of each.

    Raises:
        UserError: a part that the model lacks, or tensors of it that the other has not, each named.
    """
    for one in grafts:
        into = one.into or one.part
        given = one.tensors()
        try:
            held = model.get_submodule(into).state_dict()
        except AttributeError as error:
            raise UserError(f"grafts: this model has no {into}") from error
        wrong = [n for n, t in held.items() if n not in given or given[n].shape != t.shape]
        if wrong:
            raise UserError(f"grafts: {one.path} has no {one.part} of these shapes: {', '.join(sorted(wrong)[:8])}")
        for name, tensor in held.items():
            tensor.copy_(given[name])
        yield f"grafts: {into} is {one.part} of {one.path}, {len(held)} tensors, {len(given) - len(held)} left out"
