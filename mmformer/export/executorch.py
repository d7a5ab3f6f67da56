"""ExecuTorch: a .pte file for phones and embedded devices, lowered to XNNPACK, and a .json that describes it."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from mmformer.export.program import Program, dynamic_shapes, example
from mmformer.runtime.description import beside


def to_executorch(program: Program, path: Path, int8: bool = False) -> Path:
    """Write a program of one sample a call, and what it takes; the memory for the largest lengths is planned here.

    With `int8` the linear maps have weights of 8 bits, one scale a channel, and quantize what comes in, for each token
    anew.

    Raises:
        ValueError: executorch or torchao is not installed, or a program of several samples.
    """
    if program.description.batch != 1:  # XNNPACK reshapes along one axis of unknown length, which a sequence needs
        raise ValueError("a .pte file takes one sample a call: describe the program with batch=1")
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise ValueError("a .pte file is written by ExecuTorch: pip install mmformer[mobile]") from error
    with _quiet(), torch.no_grad():
        if int8:
            quantize_linear(program)
        exported = torch.export.export(
            program, example(program.description), dynamic_shapes=dynamic_shapes(program.description), strict=False
        )
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    with path.open("wb") as file:
        lowered.write_to_file(file)
    beside(path).write_text(program.description.to_json(), encoding="utf-8")
    return path


def quantize_linear(program: Program) -> None:
    """Let the linear maps of a program compute with weights of 8 bits and activations that are quantized as they come.

    Raises:
        ValueError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, quantize_
    except ImportError as error:
        raise ValueError("int8 programs of ExecuTorch need torchao: pip install mmformer[mobile]") from error
    quantize_(program, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of the compiler, some of which its C++ code writes past Python."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            logging.disable(logging.NOTSET)
