"""How tensors of a published file become ours, and back: the third column of a key table.

A change works on shapes alone too (tensors of the meta device), which is how a load is checked before anything is
copied. A family with a trick of its own writes its own `Change` beside its table.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Tensors = tuple[Tensor, ...]
Given = tuple[Tensor | None, ...]
"""The tensors of a rule's sources; None stands for `ZERO`, a source that the original lacks by design."""


class Change(ABC):
    """What happens to the tensors of one rule on their way in (`load`) and out (`save`, its exact inverse)."""

    verb: ClassVar[str] = "renamed"
    """The status that a report gives: renamed, transposed, joined, split, reshaped, copied or computed."""

    @abstractmethod
    def load(self, tensors: Given) -> Tensors:
        """Ours from theirs; a ValueError says what does not fit."""

    @abstractmethod
    def save(self, tensors: Tensors) -> Tensors:
        """Theirs from ours, one for each source of the rule, `ZERO` ones too."""

    def resize(self, tensor: Tensor, target: Tensor) -> Tensor:
        """One tensor that `load` gave, made to fit a target of another shape; a ValueError says why it cannot."""
        raise ValueError("this tensor has no rule to resize it")


def _present(tensors: Given) -> Tensors:
    found = tuple(tensor for tensor in tensors if tensor is not None)
    if len(found) != len(tensors):
        raise ValueError("only Joined knows what a ZERO source means")
    return found


@dataclass(frozen=True)
class Same(Change):
    """As it is."""

    def load(self, tensors: Given) -> Tensors:
        return _present(tensors)

    def save(self, tensors: Tensors) -> Tensors:
        return tensors


@dataclass(frozen=True)
class Transposed(Change):
    """A matrix stored (in, out): GPT-2's Conv1D, open_clip's projections. Never decided by a shape."""

    verb: ClassVar[str] = "transposed"

    def load(self, tensors: Given) -> Tensors:
        for tensor in _present(tensors):
            if tensor.ndim not in (1, 2):
                raise ValueError(f"{tensor.ndim} axes, but a transposed matrix has 2")
        return tuple(tensor.t() for tensor in _present(tensors))  # a bias stays as it is

    def save(self, tensors: Tensors) -> Tensors:
        return self.load(tensors)


@dataclass(frozen=True)
class Joined(Change):
    """Several tensors along their first axis, whose lengths are as `parts`: query, key and value to one map.

    A source that is `ZERO` gives zeros of its share (Whisper's key has no bias). Grouped queries: parts (8, 2, 2).
    """

    parts: tuple[int, ...] = (1, 1, 1)

    verb: ClassVar[str] = "joined"

    def load(self, tensors: Given) -> Tensors:
        like, share = next((t, p) for t, p in zip(tensors, self.parts, strict=True) if t is not None)
        unit, rest = divmod(like.shape[0], share)
        if rest:
            raise ValueError(f"{like.shape[0]} rows do not divide into {share} parts")
        joined = like.new_empty((unit * sum(self.parts), *like.shape[1:]))  # torch.cat imports a compiler for shapes
        for tensor, rows in zip(tensors, _split(joined, self.parts), strict=True):
            if tensor is not None and tensor.shape != rows.shape:
                raise ValueError(f"{tuple(tensor.shape)} beside {tuple(like.shape)}: {tuple(rows.shape)} would fit")
            rows.zero_() if tensor is None else rows.copy_(tensor)
        return (joined,)

    def save(self, tensors: Tensors) -> Tensors:
        return _split(tensors[0], self.parts)


@dataclass(frozen=True)
class Split(Change):
    """One tensor cut along its first axis, in proportion to `parts`: the inverse of `Joined`."""

    parts: tuple[int, ...]

    verb: ClassVar[str] = "split"

    def load(self, tensors: Given) -> Tensors:
        return _split(_present(tensors)[0], self.parts)

    def save(self, tensors: Tensors) -> Tensors:
        return Joined(self.parts).load(tensors)


def _split(tensor: Tensor, parts: tuple[int, ...]) -> Tensors:
    unit, rest = divmod(tensor.shape[0], sum(parts))
    if rest:
        raise ValueError(f"{tensor.shape[0]} rows do not divide into {sum(parts)} parts")
    return tensor.split([unit * part for part in parts])


@dataclass(frozen=True)
class Reshaped(Change):
    """The same numbers in another shape; -1 in both: `Reshaped(theirs=(1, 1, -1), ours=(1, -1))` for a class token."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    verb: ClassVar[str] = "reshaped"

    def load(self, tensors: Given) -> Tensors:
        (tensor,) = _present(tensors)
        fits = len(self.theirs) == tensor.ndim and all(
            wanted in (-1, size) for wanted, size in zip(self.theirs, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{tuple(tensor.shape)} in the file, where {self.theirs} belongs")
        return (tensor.reshape(self.ours),)

    def save(self, tensors: Tensors) -> Tensors:
        return (tensors[0].reshape(self.theirs),)


@dataclass(frozen=True)
class Permuted(Change):
    """The same numbers with their axes in another order: (0, 1, 3, 2) for AST's kernel, mel bins by frames."""

    order: tuple[int, ...]

    verb: ClassVar[str] = "transposed"

    def load(self, tensors: Given) -> Tensors:
        (tensor,) = _present(tensors)
        if tensor.ndim != len(self.order):
            raise ValueError(f"{tuple(tensor.shape)} in the file, where {len(self.order)} axes belong")
        return (tensor.permute(self.order),)

    def save(self, tensors: Tensors) -> Tensors:
        return (tensors[0].permute([self.order.index(axis) for axis in range(len(self.order))]),)


@dataclass(frozen=True)
class Copied(Change):
    """One tensor to several targets: a tied weight that is stored once and that our model holds twice."""

    count: int = 2

    verb: ClassVar[str] = "copied"

    def load(self, tensors: Given) -> Tensors:
        return _present(tensors) * self.count

    def save(self, tensors: Tensors) -> Tensors:
        if not all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
            raise ValueError("these tensors are one in the original, but they differ: they were trained apart")
        return tensors[:1]


@dataclass(frozen=True)
class Rows(Change):
    """A row for each word or class: a longer target keeps its own further rows, a shorter one takes the first."""

    def load(self, tensors: Given) -> Tensors:
        return _present(tensors)

    def save(self, tensors: Tensors) -> Tensors:
        return tensors

    def resize(self, tensor: Tensor, target: Tensor) -> Tensor:
        if tensor.shape[1:] != target.shape[1:]:
            raise ValueError("only the number of rows can change")
        count = min(len(tensor), len(target))
        grown = target.detach().clone()
        grown[:count] = tensor[:count]
        return grown


@dataclass(frozen=True)
class ConvolutionPatches(Change):
    """The weight (D, C, p, q) of a convolution that cuts patches of `size` (p, q), as a map (D, p * q * C).

    `swapped` takes the second spatial axis of theirs as our first (AST: mel bins by frames to frames by mel bins).
    `resize` reaches another patch size.
    """

    size: tuple[int, int]
    swapped: bool = False

    verb: ClassVar[str] = "reshaped"

    def load(self, tensors: Given) -> Tensors:
        (tensor,) = _present(tensors)
        if tensor.ndim != 4 or tuple(tensor.shape[2:]) != self.size:
            raise ValueError(f"{tuple(tensor.shape)} in the file, where patches of {self.size} belong")
        order = (0, 3, 2, 1) if self.swapped else (0, 2, 3, 1)
        return (tensor.permute(order).flatten(1),)

    def save(self, tensors: Tensors) -> Tensors:
        p, q = self._ours()
        cells = tensors[0].unflatten(1, (p, q, -1))
        return (cells.permute((0, 3, 2, 1) if self.swapped else (0, 3, 1, 2)),)

    def resize(self, tensor: Tensor, target: Tensor) -> Tensor:
        """To patches of another size, so that a resized patch gives what the patch gave (FlexiViT, 2212.08013, 3.4)."""
        p, q = self._ours()
        channels = tensor.shape[1] // (p * q)
        scale = math.sqrt(target.shape[1] / tensor.shape[1])
        size = round(p * scale), round(q * scale)
        if tensor.shape[0] != target.shape[0] or size[0] * size[1] * channels != target.shape[1]:
            raise ValueError(f"patches of {p} x {q} with {channels} channels do not scale to {tuple(target.shape)}")
        if tensor.is_meta:
            return tensor.new_empty(target.shape)
        basis = torch.eye(p * q, dtype=torch.float32).view(p * q, 1, p, q)
        grown = interpolate(basis, size, mode="bicubic", align_corners=False, antialias=True).flatten(1)
        inverse = torch.linalg.pinv(grown)  # (size, p * q): the least change of <patch, weight>
        cells = tensor.float().unflatten(1, (p * q, channels))
        return torch.einsum("sp,dpc->dsc", inverse, cells).flatten(1)

    def _ours(self) -> tuple[int, int]:
        p, q = self.size
        return (q, p) if self.swapped else (p, q)


@dataclass(frozen=True)
class GridPositions(Change):
    """A table of positions, those of `num_class` tokens before a grid's, as (num_class, D) and (rows, columns, D).

    Without class tokens there is one target, the grid. `grid` is their rows and columns (a square where None),
    `batched` says that theirs has a first axis of 1, `swapped` that their rows are our columns. Another grid is
    reached by bicubic interpolation of the grid alone.
    """

    num_class: int = 1
    grid: tuple[int, int] | None = None
    batched: bool = True
    swapped: bool = False

    verb: ClassVar[str] = "split"

    def load(self, tensors: Given) -> Tensors:
        (table,) = _present(tensors)
        if table.ndim != 2 + self.batched or (self.batched and len(table) != 1):
            wanted = "(1, N, D)" if self.batched else "(N, D)"
            raise ValueError(f"{tuple(table.shape)} in the file, where {wanted} belongs")
        table = table[0] if self.batched else table
        rows, columns = self.grid or (math.isqrt(max(0, len(table) - self.num_class)),) * 2
        if rows * columns + self.num_class != len(table):
            raise ValueError(f"{len(table)} positions, not {self.num_class} and a grid of {rows} x {columns}")
        cells = table[self.num_class :].unflatten(0, (rows, columns))
        cells = cells.transpose(0, 1) if self.swapped else cells
        return (table[: self.num_class], cells) if self.num_class else (cells,)

    def save(self, tensors: Tensors) -> Tensors:
        cells = tensors[-1].transpose(0, 1) if self.swapped else tensors[-1]
        table = torch.cat([*tensors[:-1], cells.flatten(0, 1)])
        return (table[None] if self.batched else table,)

    def resize(self, tensor: Tensor, target: Tensor) -> Tensor:
        if tensor.ndim != 3 or target.ndim != 3 or tensor.shape[2] != target.shape[2]:
            raise ValueError("only the rows and columns of the grid can change")
        if tensor.is_meta:
            return tensor.new_empty(target.shape)
        planes = tensor.float().permute(2, 0, 1)[None]
        size = tuple(target.shape[:2])
        return interpolate(planes, size, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)


@dataclass(frozen=True)
class Chain(Change):
    """One change after another on their way in."""

    changes: tuple[Change, ...]

    @property
    def verb(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.changes[-1].verb

    def load(self, tensors: Given) -> Tensors:
        for change in self.changes:
            tensors = change.load(tensors)
        return _present(tensors)

    def save(self, tensors: Tensors) -> Tensors:
        for change in reversed(self.changes):
            tensors = change.save(tensors)
        return tensors

    def resize(self, tensor: Tensor, target: Tensor) -> Tensor:
        return self.changes[-1].resize(tensor, target)
