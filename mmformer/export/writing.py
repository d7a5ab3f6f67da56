"""A model that writes texts as two programs: one reads a sample, one adds a token to what both remember."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from mmformer.export.attention import write_out_attention
from mmformer.export.describe import Size, describe
from mmformer.export.onnx import write_onnx
from mmformer.export.program import dynamic_shapes, encode, example
from mmformer.generation import Writer
from mmformer.nn import Memory
from mmformer.nn.memory import Growing, Keys
from mmformer.pooling import LastPool
from mmformer.predict import Predictor
from mmformer.runtime.description import Description
from mmformer.runtime.writing import PLACE, SCORES, TOKEN, step_of
from mmformer.writing import Writing

FIELDS = ("modality", "position", "segment")


class Joined(Growing):
    """Rows that get longer by concatenation, as a graph without state knows nothing else."""

    def __init__(self, rows: Shaped[Tensor, "B T ..."]):
        super().__init__(rows, rows.shape[1])

    @property
    def all(self) -> Shaped[Tensor, "B T ..."]:
        return self._room

    def append(self, more: Shaped[Tensor, "B n ..."]) -> Shaped[Tensor, "B T ..."]:
        self._room = torch.cat([self._room, more], 1)
        return self._room


@dataclass(frozen=True)
class Kept:
    """What one Transformer, the part `name` of the model, remembers: of how many calls, and of its context's."""

    name: str
    calls: int
    crossed: int


class Reading(nn.Module):
    """The first pass: a sample's tensors to the scores of its first token, and all that is remembered of it."""

    def __init__(self, writer: Writer, description: Description):
        super().__init__()
        self.model = copy.deepcopy(writer.model).eval().requires_grad_(False)
        write_out_attention(self.model)
        self.writer, self.description = replace(writer, model=self.model), description

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        memory, scores = self.read(tensors)
        return (scores, *flatten(memory).values())

    def read(self, tensors: Sequence[Tensor]) -> tuple[Memory, Tensor]:
        """The memory and the scores of the first pass."""
        memory = Memory(self.writer.modality)
        encoded = encode(self.model, self.description, tensors, memory)
        tokens = self.writer._first(encoded, encoded.num_samples, memory)
        return memory, self.model.heads[self.writer.head](LastPool()(tokens)).float()

    def kept(self, memory: Memory) -> tuple[Kept, ...]:
        """Which parts remember what."""
        names = {part: name for name, part in self.model.named_modules()}
        return tuple(Kept(names[own], len(past.own), len(past.crossed)) for own, past in memory._pasts.items())


class Step(nn.Module):
    """A further pass: one token, its place in the text and what is remembered, to scores and what has grown of that."""

    def __init__(self, reading: Reading, kept: Sequence[Kept], names: Sequence[str]):
        super().__init__()
        self.model, self.writer, self._kept, self.names = reading.model, reading.writer, tuple(kept), tuple(names)

    def forward(self, token: Tensor, place: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        memory = self._restored(dict(zip(self.names, past, strict=True)))
        scores = self.writer.extend(memory, token, place, torch.zeros_like(place))[:, 0]
        return (scores, *(value for name, value in flatten(memory).items() if grows(name)))

    def _restored(self, held: Mapping[str, Tensor]) -> Memory:
        memory = Memory(self.writer.modality)
        for number, kept in enumerate(self._kept):
            past = memory.of(self.model.get_submodule(kept.name))
            past.keys = _keys(held, f"past{number}_")
            past.own = [_pair(held, f"past{number}_", call) for call in range(kept.calls)]
            if kept.crossed:
                past.context = _keys(held, f"past{number}_context_")
                pairs = [_pair(held, f"past{number}_context_", call) for call in range(kept.crossed)]
                past.crossed = [(key.all, value.all) for key, value in pairs]
        return memory


def flatten(memory: Memory) -> dict[str, Tensor]:
    """All tensors of a memory, in a fixed order."""
    out: dict[str, Tensor] = {}
    for number, past in enumerate(memory._pasts.values()):
        out |= _tensors(f"past{number}_", past.keys, [(key.all, value.all) for key, value in past.own])
        if past.crossed:
            out |= _tensors(f"past{number}_context_", past.context, past.crossed)
    return out


def grows(name: str) -> bool:
    """Whether a tensor of a memory gets longer by a step."""
    return "_context_" not in name


def _tensors(prefix: str, keys: Keys | None, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    assert keys is not None
    out = {prefix + name: getattr(keys, name).all for name in FIELDS}
    for call, (key, value) in enumerate(pairs):
        out |= {f"{prefix}key{call}": key, f"{prefix}value{call}": value}
    return out


def _keys(held: Mapping[str, Tensor], prefix: str) -> Keys:
    return Keys(*[Joined(held[prefix + name]) for name in FIELDS])


def _pair(held: Mapping[str, Tensor], prefix: str, call: int) -> tuple[Growing, Growing]:
    return Joined(held[f"{prefix}key{call}"]), Joined(held[f"{prefix}value{call}"])


def to_onnx_pair(predictor: Predictor, path: Path, picture: Size | None = None) -> Description:
    """Write both programs: `model.onnx` and, beside it, `model.step.onnx`; they take one sample at a time.

    Raises:
        ValueError: the model writes no texts; or as `describe`.
    """
    writing = Writing.of(predictor.model, predictor.objectives, predictor.features, predictor.marks)
    writer = writing.writer
    names = [writer.modality] if not writer._fuses else [name for name in predictor.features]
    described = describe(predictor.model, {name: predictor.features[name] for name in names}, None, (), picture, 1)
    reading = Reading(writer, described)
    tensors = example(described)
    with torch.no_grad():
        memory, _ = reading.read(tensors)
    past = flatten(memory)
    description = replace(described, outputs=(SCORES, *past), writes=_rules(writing))
    write_onnx(reading, path, tensors, dynamic_shapes(described), description)
    _write_step(Step(reading, reading.kept(memory), list(past)), step_of(path), past)
    return description


def _write_step(step: Step, path: Path, past: Mapping[str, Tensor]) -> None:
    lengths: dict[str, Any] = {}
    shapes = []
    for name in past:
        own = name[: name.rindex("_")]
        shapes.append({1: lengths.setdefault(own, torch.export.Dim(f"{own}_length", min=2))})
    tensors = (torch.zeros(1, 1, dtype=torch.long), torch.ones(1, dtype=torch.long), *past.values())
    outputs = (SCORES, *(f"new_{name}" for name in past if grows(name)))
    dynamic = {"token": {}, "place": {}, "past": tuple(shapes)}
    write_onnx(step, path, tensors, dynamic, Description(inputs=(), outputs=outputs), (TOKEN, PLACE, *past))


def _rules(writing: Writing) -> dict[str, Any]:
    """What texts are written by, as plain data: see `mmformer.runtime.writing`."""
    limits = writing.limits(1)
    around = writing.text.tokenizer.specials
    return {
        "modality": writing.writer.modality,
        "begin": list(around.begin) if writing.text.begin else [],
        "end": list(around.end) if writing.text.end else [],
        "first": writing.first,
        "start": writing.start,
        "stop": list(limits.stop),
        "banned": list(limits.banned),
    }
