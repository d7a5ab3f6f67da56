"""torch.export: a .pt2 file for PyTorch without this package's code; AOTInductor: one compiled for this machine."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch.export import ExportedProgram

from mmformer.export.program import Program, dynamic_shapes, example
from mmformer.runtime.description import KEY, beside


def to_torch(program: Program, path: Path) -> Path:
    """Write a program for `torch.export.load(path).module()`, which is called with its tensors in their order.

    What it takes is in the file, under "mmformer" (`extra_files` of `torch.export.load`).
    """
    torch.export.save(_exported(program), path, extra_files={KEY: program.description.to_json()})
    return path


def to_package(program: Program, path: Path) -> Path:
    """Compile a program for this kind of processor, for `torch._inductor.aoti_load_package(path)`.

    What it takes is in a .json file beside it. Needs a C++ compiler.
    """
    torch._inductor.aoti_compile_and_package(_exported(program), package_path=str(path))
    beside(path).write_text(program.description.to_json(), encoding="utf-8")
    return path


def _exported(program: Program) -> ExportedProgram:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch about its own insides
        return torch.export.export(
            program, example(program.description), dynamic_shapes=dynamic_shapes(program.description), strict=False
        )
