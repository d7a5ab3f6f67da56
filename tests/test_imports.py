"""Imports run one way, and the source stays small: laws over the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmformer"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON = [*SOURCES, *(path for path in [ROOT / "train.py"] if path.exists())]

MODEL = ["batch losses metrics", "tokens", "patterns", "visibility pooling", "nn", "encoders fusion heads", "codec"]
MODEL += ["model", "generation", "objectives"]
RANK = {part: rank for rank, parts in enumerate([*MODEL, "training"]) for part in parts.split()}
"""A part imports itself and parts of a lower rank; two parts of one rank do not know each other."""

DATA = {"datasets"}
"""Imports `batch` only; files mean nothing to the model, so training and what lies above it alone may import it."""

DEVICE = {"runtime"}
"""Runs without torch, so that it may import those modules of `datasets` alone that do."""
WITH_TORCH = PACKAGE / "runtime" / "executorch.py"
"""The one file of it that cannot: ExecuTorch's runtime for Python takes torch's tensors."""

ABOVE = {"checkpoints", "run", "predict", "writing", "judging", "capfilt"}
ABOVE |= {"check", "report", "export", "compress", "search", "evaluate", "cli"}
"""Import the model, and nothing below imports them; training saves checkpoints, and may import those."""

HEAVY = {
    "transformers",
    "wandb",
    "onnx",
    "onnxruntime",
    "gradio",
    "sklearn",
    "pandas",
    "matplotlib",
    "datasets",
    "timm",
    "faiss",
}
TRAINERS = {"hydra", "omegaconf", "pytorch_lightning", "lightning", "wandb"}


class Import(NamedTuple):
    """One import statement: of which module, where, and whether importing the file runs it."""

    module: str
    place: str
    at_top: bool


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def part(path: Path) -> str:
    """The part of the package that a file belongs to: `nn` for nn/attention.py, "" for the package's __init__.py."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, also those inside functions."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, place(path, child.lineno), at_top)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{place(path, child.lineno)}: write the import in full, from mmformer..."
                module = child.module or ""
                names = [f"{module}.{alias.name}" for alias in child.names] if module == "mmformer" else [module]
                for name in names:
                    yield Import(name, place(path, child.lineno), at_top)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
                isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            )
            yield from visit(child, at_top and not inside)

    yield from visit(ast.parse(path.read_text()), True)


def allowed(source: str, target: str) -> bool:
    """Whether the part `source` may import the part `target`."""
    if source == target:
        return True
    if source in DATA:
        return target == "batch"
    if source in DEVICE:
        return target in DATA
    if source in RANK:
        if target in RANK:
            return RANK[target] < RANK[source]
        return source == "training" and target in {*DATA, "checkpoints"}
    return True  # a part above training imports what it needs


def test_every_part_has_its_place() -> None:
    unplaced = {part(path) for path in SOURCES} - {"", *RANK, *DATA, *DEVICE, *ABOVE}
    assert not unplaced, (
        f"{unplaced}: say in RANK, DATA, DEVICE or ABOVE who may import it, and in docs/architecture.md"
    )


def test_imports_run_one_way() -> None:
    wrong = []
    for path in SOURCES:
        for found in imports(path):
            package, *rest = found.module.split(".")
            if package == "mmformer" and rest and part(path) and not allowed(part(path), rest[0]):
                wrong.append(f"{found.place}: {part(path)} imports {found.module}")
    assert not wrong, "imports against the one direction (docs/architecture.md):\n" + "\n".join(wrong)


def test_the_runtime_reaches_no_torch() -> None:
    """Neither do its files import torch, nor do those that they import, wherever the import stands."""
    reached = sorted((PACKAGE / "runtime").glob("*.py"))
    for path in reached:
        for found in imports(path) if path != WITH_TORCH else ():
            package, *rest = found.module.split(".")
            assert package not in {"torch", "torchaudio", "jaxtyping"}, f"{found.place} imports {found.module}"
            for inner in (ROOT / package / Path(*rest)).with_suffix(".py"), ROOT / package / Path(*rest, "__init__.py"):
                if package == "mmformer" and rest and inner.exists() and inner not in reached:
                    reached.append(inner)


def test_no_circles_between_parts() -> None:
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        targets = {found.module.split(".")[1] for found in imports(path) if found.module.startswith("mmformer.")}
        graph.setdefault(part(path), set()).update(targets - {part(path)})
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph, f"these parts import one another in a circle: {graph}"


def test_model_knows_no_trainer() -> None:
    below = {name for parts in MODEL for name in parts.split()}
    wrong = [
        f"{found.place}: imports {found.module}"
        for path in SOURCES
        if part(path) in below
        for found in imports(path)
        if found.module.split(".")[0] in TRAINERS
    ]
    assert not wrong, "model code runs without Hydra, Lightning and a tracker:\n" + "\n".join(wrong)


def test_heavy_imports_are_lazy() -> None:
    wrong = [
        f"{found.place}: import {found.module} inside the function that needs it"
        for path in PYTHON
        for found in imports(path)
        if found.at_top and found.module.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["mmformer", "mmformer.cli", "train"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'pytorch_lightning', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"import {module} imports {done.stdout.strip()}, which `--help` would wait for"


def test_python_names_no_config() -> None:
    wrong = [
        place(path, node.lineno)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("configs/")
    ]
    assert not wrong, f"YAML names Python, Python names no config: {wrong}"


def test_files_and_functions_are_short() -> None:
    wrong = []
    for path in PYTHON:
        source = path.read_text()
        if (lines := source.count("\n")) > 450:
            wrong.append(f"{place(path, 1)}: {lines} lines, at most 450: split it by subject")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > 60:
                wrong.append(f"{place(path, node.lineno)}: {node.name} has {lines} lines, at most 60")
            taken = len(node.args.args) + len(node.args.kwonlyargs) - 1
            if node.name == "__init__" and taken > 8:
                wrong.append(f"{place(path, node.lineno)}: a constructor of {taken} parameters, at most 8: pass parts")
    assert not wrong, "\n".join(wrong)


def test_public_names_have_docstrings() -> None:
    wrong = [
        f"{place(path, node.lineno)}: {node.name} has no docstring"
        for path in PYTHON
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not wrong, "\n".join(wrong)


def test_inheritance_is_two_deep() -> None:
    bases = {
        node.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }

    def depth(name: str) -> int:
        return 1 + max(map(depth, bases[name]), default=0) if name in bases else 0

    wrong = {name: depth(name) for name in bases if depth(name) > 2}
    assert not wrong, f"classes of ours above classes of ours above classes of ours; compose them instead: {wrong}"
