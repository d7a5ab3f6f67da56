"""A .pte file in Python.

ExecuTorch's runtime for Python takes and gives torch's tensors, so that this file alone imports torch; its runtimes in
C++, for Android and for iOS do without.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmformer.runtime.description import Description, beside


class ExecutorchEngine:
    """A program of ExecuTorch; `threads` of one operation."""

    def __init__(self, path: Path, threads: int | None = None):
        if not beside(path).is_file():
            raise FileNotFoundError(f"{beside(path)} is missing: it travels with {path.name}")
        self.description = Description.from_json(beside(path).read_text(encoding="utf-8"), str(beside(path)))
        try:
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
        except ImportError as error:
            raise ValueError(f"{path.name} needs ExecuTorch: pip install mmformer[mobile]") from error
        if threads:
            portable_lib._unsafe_reset_threadpool(threads)
        self._program = Runtime.get().load_program(path)
        self._method: Any = self._program.load_method("forward")

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        from torch import from_numpy

        given = [from_numpy(np.ascontiguousarray(inputs[name])) for name in self.description.names]
        found = self._method.execute(given)
        # The next call writes over these.
        return {name: out.numpy().copy() for name, out in zip(self.description.outputs, found, strict=True)}
