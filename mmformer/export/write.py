"""The whole way from a trained model to a checked file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmformer.datasets.features import Feature
from mmformer.export.check import (
    EXACT,
    INT8,
    Bar,
    Compared,
    Samples,
    compare,
    compare_texts,
    engine_of,
    rows_of,
    verify,
)
from mmformer.export.describe import Size, describe
from mmformer.export.executorch import quantize_linear, to_executorch
from mmformer.export.onnx import quantize_onnx, to_onnx
from mmformer.export.program import Program
from mmformer.export.torch_export import to_package, to_torch
from mmformer.export.writing import to_onnx_pair
from mmformer.objectives import Objective
from mmformer.predict import Predictor
from mmformer.runtime import Runtime
from mmformer.runtime.description import Description, beside
from mmformer.runtime.writing import step_of
from mmformer.writing import Writing

TEXTS = 40
"""So many texts are compared, as writing one takes many steps."""
SUFFIXES = (".onnx", ".pt2", ".pte")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to write.

    `encoder` is the one modality whose encoder is exported alone, for its embeddings. `picture` is the size of pictures
    where their rule bounds none. `package` compiles a .pt2 file for this machine. `exclude` names nodes of an ONNX file
    that keep their precision in int8.
    """

    int8: bool = False
    encoder: str | None = None
    picture: Size | None = None
    package: bool = False
    exclude: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written and checked; `size` in bytes, `seconds` that writing took."""

    path: Path
    size: int
    seconds: float
    description: Description
    compared: tuple[Compared, ...]

    @property
    def difference(self) -> float:
        """The largest of all subsets."""
        return max(compared.difference for compared in self.compared)


def export(
    predictor: Predictor, path: Path, samples: Samples, options: Options | None = None, bar: Bar | None = None
) -> Exported:
    """Write a trained model to a file, by its suffix, and compare the two on `samples`; as strictly as `bar` says.

    Raises:
        ExportError: the file does not say what the model says; it is removed.
        ValueError: a model, a feature or an option that the target does not take; the message names it.
    """
    options = options or Options()
    _check(path, options)
    started = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    files = (path, beside(path), step_of(path))
    try:
        if options.encoder is None and writes(predictor):
            description = _write_pair(predictor, path, options)
            seconds = time.monotonic() - started
            found = compare_texts(predictor, Runtime(path, threads=1), samples[:TEXTS])
        else:
            program, objective = program_of(predictor, options, batch=1 if path.suffix == ".pte" else None)
            description = program.description
            _write(program, path, options)
            seconds = time.monotonic() - started
            found = compare(predictor, objective, Runtime.of(engine_of(path)), samples)
        verify(found, bar or (INT8 if options.int8 else EXACT), path)
    except Exception:
        for written in files:
            written.unlink(missing_ok=True)
        raise
    size = sum(written.stat().st_size for written in files if written.exists())
    return Exported(path=path, size=size, seconds=seconds, description=description, compared=tuple(found))


def writes(predictor: Predictor) -> bool:
    """Whether a model is there to write texts: it can, and predicts no label."""
    if any(hasattr(part, "target") for part in predictor.objectives.values()):
        return False
    with suppress(ValueError):  # it cannot
        Writing.of(predictor.model, predictor.objectives, predictor.features, predictor.marks)
        return True
    return False


def program_of(
    predictor: Predictor, options: Options | None = None, batch: int | None = None
) -> tuple[Program, Objective | None]:
    """A predictor as a program: what it predicts, or what it embeds where it predicts nothing, and by which objective.

    Raises:
        ValueError: no encoder of that name; or as `Program` and `describe`.
    """
    options = options or Options()
    features: Mapping[str, Feature] = predictor.features
    objective = None
    if options.encoder is not None:
        if options.encoder not in features:
            raise ValueError(f"no encoder {options.encoder!r}: this model has {', '.join(features)}")
        features = {options.encoder: features[options.encoder]}
    else:
        objective = next((part for part in predictor.objectives.values() if hasattr(part, "target")), None)
    labels = () if objective is None else predictor.labels
    description = describe(predictor.model, features, objective, labels, options.picture, batch)
    return Program(predictor.model, objective, description), objective


def known_rows(predictor: Predictor, run: Path) -> Samples:
    """Rows of the test split that a run was trained beside, as its config says.

    Raises:
        FileNotFoundError: the run does not say, or its data are not there.
    """
    config = _config(run)
    named = (config.get("data") or {}).get("path")
    root = (config.get("paths") or {}).get("root", "")
    places = [Path(named), Path(root) / named] if named else []
    for place in places:
        if place.exists():
            return rows_of(predictor, place)
    said = f"its data, {named}, are not there" if named else "it does not say what its data are"
    raise FileNotFoundError(f"{run} cannot be checked, as {said}: give rows to check with (--data rows.csv)")


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check(path: Path, options: Options) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a file is written by its suffix, one of {', '.join(SUFFIXES)}")
    if options.package and path.suffix != ".pt2":
        raise ValueError(f"{path}: a package of AOTInductor ends in .pt2")


def _write(program: Program, path: Path, options: Options) -> None:
    if path.suffix == ".pte":
        to_executorch(program, path, int8=options.int8)
    elif path.suffix == ".pt2":
        if options.int8:
            quantize_linear(program)
        (to_package if options.package else to_torch)(program, path)
    else:
        to_onnx(program, path)
        if options.int8:
            _quantize(path, options)


def _write_pair(predictor: Predictor, path: Path, options: Options) -> Description:
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: a model that writes texts is exported as .onnx, or one encoder of it (--encoder)")
    description = to_onnx_pair(predictor, path, options.picture)
    for written in (path, step_of(path)) if options.int8 else ():
        _quantize(written, options)
    return description


def _quantize(path: Path, options: Options) -> None:
    """Put an ONNX file of 8 bits in the place of one of 32."""
    whole = path.replace(path.with_suffix(".fp32.onnx"))
    try:
        quantize_onnx(whole, path, options.exclude)
    finally:
        whole.unlink(missing_ok=True)
