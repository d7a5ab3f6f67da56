"""A trained model as a function of plain, padded tensors: one graph for every subset of the modalities."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.encoders import Encoder
from mmformer.export.attention import write_out_attention
from mmformer.model import Encoded, Model
from mmformer.nn import Memory
from mmformer.objectives import Objective
from mmformer.runtime.description import FUSED, PRESENT, SIZE, Description, Input, embedding_of

Given = dict[str, Tensor]
NOTHING = Batch(ids=(), inputs={})
"""Objectives that predict from what is encoded look at no batch."""


class Program(nn.Module):
    """A model that takes the tensors of `description.names`, in their order, and gives those of `description.outputs`.

    It holds a copy of what it needs of the model, in evaluation mode, whose attention is written out. What runs is the
    model's own code on padded tokens: a modality that a sample lacks has none that is real, as `present` says.

    Raises:
        ValueError: an encoder that only reads packed items, or an output that the model does not have.
    """

    def __init__(self, model: Model, objective: Objective | None, description: Description):
        super().__init__()
        self.description = description
        self.model = _needed(model, objective, description).eval().requires_grad_(False)
        self.objective = copy.deepcopy(objective).eval() if objective is not None else None
        write_out_attention(self.model)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        encoded = encode(self.model, self.description, tensors)
        predicted: dict[str, Tensor] = {}
        if self.objective is not None:
            predicted = self.objective.predict(self.model, encoded, NOTHING)
        predicted |= {embedding_of(name): self._embedding(name, encoded) for name in self.description.embedded}
        return tuple(predicted[name] for name in self.description.outputs)

    def _embedding(self, name: str, encoded: Encoded) -> Tensor:
        """What `Predictor.embed` gives."""
        if name in self.model.heads:
            return self.model.output(encoded, name, source=name)[0].float()
        return self.model.summary(encoded, None if name == FUSED else name)[0].float()


def encode(model: Model, description: Description, tensors: Sequence[Tensor], memory: Memory | None = None) -> Encoded:
    """What the encoders make of a program's tensors; `memory` is for the modality that it grows."""
    given = dict(zip(description.names, tensors, strict=True))
    encoded = Encoded({}, tensors[0].shape[0])
    for place, part in enumerate(description.inputs):
        encoder = model.encoders[part.name]
        assert isinstance(encoder, Encoder)
        kept = memory if memory is not None and memory.grows == part.name else None
        encoded[part.name] = encoder.padded(given[part.name], _size(part, place, given), kept)
    return encoded


def _size(part: Input, place: int, given: Given) -> Tensor:
    """How much of each item is real; nothing where the sample lacks it."""
    values = given[part.name]
    if part.ragged:
        size = given[part.name + SIZE]
    else:  # all of it
        ones = torch.ones_like(values.flatten(1)[:, :1], dtype=torch.long)
        size = torch.cat([ones * values.shape[1 + axis] for axis in range(part.axes)], 1)
    return size * given[PRESENT][:, place : place + 1].long() if PRESENT in given else size


def _needed(model: Model, objective: Objective | None, description: Description) -> Model:
    """A copy of the parts of a model that some outputs are computed by."""
    names = [part.name for part in description.inputs]
    embedded = description.embedded
    fused = FUSED in embedded or any(name in model.views for name in embedded)
    heads = set(embedded)
    if objective is not None:
        source = getattr(objective, "source", None)
        fused = fused or source is None or source in model.views
        heads.add(str(getattr(objective, "head", "")))
    for name in names:
        if not isinstance(model.encoders[name], Encoder):
            kind = type(model.encoders[name]).__name__
            raise ValueError(f"the encoder of {name} is a {kind}, which has no padded form: export the other ones")
    part = copy.copy(model)
    part._modules = dict(model._modules)
    part.encoders = nn.ModuleDict({name: model.encoders[name] for name in names})
    part.heads = nn.ModuleDict({name: head for name, head in model.heads.items() if name in heads})
    if not fused:
        part.fusion, part.views = None, nn.ModuleDict()
    return copy.deepcopy(part)


def example(description: Description) -> tuple[Tensor, ...]:
    """Tensors that a program can be traced with: each length a middle one, so that it stands for all."""
    given: Given = {}
    batch = 1 if description.batch == 1 else 2
    for part in description.inputs:
        length = part.shape[0] or min(part.largest[0], part.least + part.multiple)
        shape = (batch, length, *part.shape[1:])
        given[part.name] = torch.zeros(shape, dtype=getattr(torch, part.dtype))
        if part.ragged:
            given[part.name + SIZE] = torch.tensor([shape[1 : 1 + part.axes]] * batch)
    given[PRESENT] = torch.ones(batch, len(description.inputs), dtype=torch.bool)
    return tuple(given[name] for name in description.names)


def dynamic_shapes(description: Description) -> dict[str, Any]:
    """Which axes of a program's inputs may be of any length, for torch.export."""
    many = description.batch != 1
    batch = torch.export.Dim("batch", min=1, max=description.batch) if many else None
    specs: dict[str, dict[int, Any]] = {name: {0: batch} if many else {} for name in description.names}
    for part in description.inputs:
        if part.shape[0] == 0:
            bounds = {"min": part.least // part.multiple, "max": part.largest[0] // part.multiple}
            length = torch.export.Dim(f"{part.name}_length", **bounds)
            specs[part.name] |= {1: length if part.multiple == 1 else part.multiple * length}
    return {"tensors": tuple(specs[name] for name in description.names)}
