"""What travels with a program: what it takes, what goes before it and what comes after, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

KEY = "mmformer"
"""Under which an ONNX file holds it in its metadata, and a .pt2 file among its own."""
FORMAT = 1
PRESENT, SIZE = "present", "_size"
FUSED = "fused"
"""What stands in the place of a modality for the whole of a sample."""

Kind = Literal["Classes", "Labels", "Number"]


@dataclass(frozen=True, kw_only=True)
class Input:
    """What a program takes of one modality: (batch, *shape), 0 in `shape` for an axis that may be of any length.

    `largest` is the shape of the largest item and `shortest` the length of the shortest one; the first axis of the
    tensor is at least `least` and divisible by `multiple`. `ragged` says that items of different lengths may share a
    batch: the rest is filled up with zeros, and a further input `<name>_size` (batch, axes) int64 says how much of each
    is real. `feature` makes an item of a raw value.
    """

    name: str
    dtype: Literal["int64", "uint8", "float32"]
    shape: tuple[int, ...]
    largest: tuple[int, ...]
    shortest: int
    least: int
    axes: int
    multiple: int
    ragged: bool
    feature: Mapping[str, Any]

    @property
    def fixed(self) -> bool:
        """Whether all items have one shape."""
        return not self.ragged and 0 not in self.shape


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a program is for.

    With several inputs it also takes `present` (batch, inputs) bool, in their order: which of them a sample has. `kind`
    says what `logits` or `value` stand for, of `labels`; what they are read off are the modalities `reads`, empty for
    all of a sample. `batch` is the most samples of one call, None for any number. `writes` is what a model that writes
    texts goes by (`mmformer.runtime.writing`).
    """

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    kind: Kind | None = None
    labels: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    batch: int | None = None
    writes: Mapping[str, Any] | None = None
    format: int = FORMAT
    mmformer: str = ""

    @property
    def embedded(self) -> tuple[str, ...]:
        """What there is an embedding of: modalities, or FUSED."""
        end = embedding_of("")
        return tuple(name.removesuffix(end) for name in self.outputs if name.endswith(end))

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that the program takes, in their order."""
        names = [name for part in self.inputs for name in (part.name, *([part.name + SIZE] if part.ragged else []))]
        return (*names, PRESENT) if len(self.inputs) > 1 else tuple(names)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, origin: str) -> Description:
        """What `to_json` wrote; `origin` names the file in errors.

        Raises:
            ValueError: damaged, or of a newer version.
        """
        try:
            held = json.loads(text)
            version = int(held["format"])
            if version > FORMAT:
                raise ValueError(f"{origin} has format {version}, this version reads up to {FORMAT}: update mmformer")
            inputs = tuple(_input(part) for part in held["inputs"])
            rest: dict[str, Any] = {name: tuple(held[name]) for name in ("outputs", "labels", "reads")}
            return cls(inputs=inputs, kind=held["kind"], batch=held["batch"],
                       mmformer=held["mmformer"], writes=held.get("writes"), **rest)  # fmt: skip
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{origin} does not say what it takes ({error!r}): export it with mmformer") from error


def embedding_of(name: str) -> str:
    """The output with the embedding of a modality, or of FUSED."""
    return f"{name}_embedding"


def _input(held: Mapping[str, Any]) -> Input:
    values: dict[str, Any] = {field.name: held[field.name] for field in fields(Input)}
    values |= {name: tuple(values[name]) for name in ("shape", "largest")}
    return Input(**values)


def beside(path: Path) -> Path:
    """The file that describes a program which cannot hold it itself: `model.pte` has `model.pte.json`."""
    return path.with_name(f"{path.name}.json")
