"""ONNX: one file for ONNX Runtime, on any machine; int8 of it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmformer.export.program import Program, dynamic_shapes, example
from mmformer.runtime.description import KEY, Description

OPSET = 20
QUANTIZED = ["MatMul", "Gemm", "Gather"]
"""Convolutions stay as they are: ONNX Runtime computes those of 8 bits slower than those of 32."""


def to_onnx(program: Program, path: Path) -> Path:
    """Write a program as one file, which says in its metadata what it takes.

    Raises:
        ValueError: onnx or onnxscript is not installed.
    """
    description = program.description
    return write_onnx(program, path, example(description), dynamic_shapes(description), description)


def write_onnx(
    program: nn.Module,
    path: Path,
    tensors: tuple[Tensor, ...],
    dynamic: dict[str, Any],
    description: Description,
    names: Sequence[str] = (),
) -> Path:
    """Write any module of tensors, traced with some; `names` are its inputs', those of the description by default."""
    onnx = _installed("onnxscript", "onnx")[1]
    with _quiet(), torch.no_grad():
        made = torch.onnx.export(
            program,
            tensors,
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            dynamic_shapes=dynamic,
            input_names=list(names or description.names),
            output_names=list(description.outputs),
            verbose=False,
        )
    assert made is not None
    held = made.model_proto
    _describe(onnx, held, description.to_json())
    onnx.save(held, str(path))
    return path


def quantize_onnx(source: Path, path: Path, exclude: Sequence[str] = ()) -> Path:
    """Weights of 8 bits, one scale a channel, and activations quantized as they come; nodes of `exclude` stay as is.

    Raises:
        ValueError: onnx or onnxruntime is not installed.
    """
    onnx = _installed("onnxruntime.quantization", "onnx")[1]
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            str(source),
            str(path),
            op_types_to_quantize=QUANTIZED,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=list(exclude),
        )
    held = onnx.load(str(path))
    described = next(entry.value for entry in onnx.load(str(source)).metadata_props if entry.key == KEY)
    _describe(onnx, held, described)
    onnx.save(held, str(path))
    return path


def _describe(onnx: Any, held: Any, description: str) -> None:
    kept = {entry.key: entry.value for entry in held.metadata_props} | {KEY: description}
    onnx.helper.set_model_props(held, kept)


def _installed(*names: str) -> list[Any]:
    from importlib import import_module

    try:
        return [import_module(name) for name in names]
    except ImportError as error:
        raise ValueError(f"ONNX files need {error.name}: pip install mmformer[deploy]") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of the exporter and the quantizer, which concern their own insides."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
