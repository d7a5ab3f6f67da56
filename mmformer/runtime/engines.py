"""What runs a program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mmformer.runtime.description import KEY, Description


@runtime_checkable
class Engine(Protocol):
    """A loaded program."""

    @property
    def description(self) -> Description: ...

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Its outputs by name, of inputs by name."""
        ...


def open_session(path: Path, threads: int | None = None) -> Any:
    """A session of ONNX Runtime.

    Raises:
        ValueError: ONNX Runtime is not installed, or does not open the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"{path.name} needs ONNX Runtime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    if threads:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of no common class
        raise ValueError(f"{path} cannot be opened: {error}") from error


class OnnxEngine:
    """An ONNX file in ONNX Runtime on the CPU; `threads` of one operation, by default one for each core."""

    def __init__(self, path: Path, threads: int | None = None):
        self._session = open_session(path, threads)
        held = self._session.get_modelmeta().custom_metadata_map.get(KEY, "{}")
        self.description = Description.from_json(held, str(path))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = self.description.outputs
        found = self._session.run(list(names), dict(inputs))
        return {name: np.asarray(values) for name, values in zip(names, found, strict=True)}


def open_engine(path: Path, threads: int | None = None) -> Engine:
    """The program of a file, by its suffix.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither .onnx nor .pte, damaged, or what runs it is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: write it with `mmformer export`")
    if path.suffix == ".onnx":
        return OnnxEngine(path, threads)
    if path.suffix == ".pte":
        from mmformer.runtime.executorch import ExecutorchEngine

        return ExecutorchEngine(path, threads)
    raise ValueError(f"{path}: a file that runs here ends in .onnx or .pte")
