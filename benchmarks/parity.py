"""Each family of checkpoints against its originals: `python -m benchmarks.parity` writes what `mmformer models` shows.

It runs the tests that compare with the reference libraries, and notes, of every comparison that is within the bar, the
family, the class of the reference and the difference. Each model is converted too, to every library that has its like.
With paths of test files it runs these alone, and keeps what is known of the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # pytest is to see these imported, as it checks types in them
    from torch import Tensor

    from mmformer.checkpoints.changes import Change
    from mmformer.checkpoints.load import Loaded
    from mmformer.checkpoints.table import Described, Family

LIBRARIES = ("transformers", "timm", "open-clip-torch", "torchvision", "torchaudio", "torch")
ALL = "tests/checkpoints/families"
MEASURED = Path(__file__).resolve().parents[1] / "mmformer" / "checkpoints" / "families" / "measured.json"
SIZES = {
    "GridPositions": "picture size",
    "ConvolutionPatches": "patch size",
    "Rows": "rows (vocabulary, places, classes)",
}
"""What a change that resizes tensors is good for."""


class Recorder:
    """Stands in the way of what the tests call: the reference that is scrambled, the family read, the comparison."""

    def __init__(self, known: dict[str, dict[str, Any]]) -> None:
        self.families = known
        self.reference, self.family = "", ""
        self.size, self.converting = 0, False
        self.converted: dict[tuple[str, str, str], str] = {}

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Before any test takes them by name."""
        oracles: Any = import_module("tests.checkpoints.oracles")
        loading: Any = import_module("mmformer.checkpoints.load")
        oracles.scramble, oracles.close = self.scramble(oracles.scramble), self.close(oracles.close)
        loading.describe, loading.load = self.describe(loading.describe), self.load(loading.load)

    def pytest_runtest_logstart(self) -> None:
        """A reference of another test counts for this one only if this one makes none."""
        self.size = 0

    def scramble(self, scramble: Callable[..., Any]) -> Callable[..., Any]:
        """Notes the class of the reference: the largest module since the last load that is none of ours."""

        def recorded(module: Any, *args: Any, **options: Any) -> Any:
            if not type(module).__module__.startswith("mmformer"):
                size = sum(parameter.numel() for parameter in module.parameters())
                if size > self.size:
                    self.reference, self.size = type(module).__name__, size
            return scramble(module, *args, **options)

        return recorded

    def describe(self, describe: Callable[..., Described]) -> Callable[..., Described]:
        """Notes the family, the parts it gives and what it resizes."""

        def recorded(family: Family, source: Any, options: Mapping[str, Any]) -> Described:
            described = describe(family, source, options)
            if self.converting:
                return described
            self.family, self.size = f"{family.library}/{family.name}", 0
            model = described.model
            kinds = {**model, "objectives": described.objectives}
            names = [f"{kind}.{name}" for kind in ("encoders", "heads", "objectives") for name in kinds.get(kind) or {}]
            changes = [rule.change for rule in family.rules(described)]
            self._note("parts", [*names, *["fusion"] * bool(model.get("fusion"))])
            self._note("resizes", [_resizes(change) for change in changes if _resizes(change)])
            return described

        return recorded

    def load(self, load: Callable[..., Loaded]) -> Callable[..., Loaded]:
        """Converts every whole model that is loaded, once for each class of reference."""

        def recorded(*args: Any, **options: Any) -> Loaded:
            loaded = load(*args, **options)
            if not (options.get("part") or self.converting) and loaded.report.ok:
                self.converting = True  # which loads what it wrote
                try:
                    self._convert(loaded)
                finally:
                    self.converting = False
            return loaded

        return recorded

    def _convert(self, loaded: Loaded) -> None:
        from mmformer.checkpoints import save_model
        from mmformer.checkpoints.convert import convert, targets

        model: Any = loaded.model
        objectives = loaded.described.objectives if loaded.objectives else {}
        config = {"model": loaded.config, "objectives": objectives, "origins": [loaded.origin.plain()]}
        for library in targets(loaded.family):
            key = (self.family, self.reference, library)
            if self.converted.get(key) == "":
                continue
            with TemporaryDirectory() as folder:
                try:
                    run = save_model(Path(folder, "run"), model, config, objectives=loaded.objectives)
                    convert(run, library, Path(folder, "out"), near=True)
                except ValueError as error:
                    self.converted[key] = str(error)
                else:
                    self.converted[key] = ""
                    self._note("converts", [library])

    def close(self, close: Callable[..., float]) -> Callable[..., float]:
        """Notes the difference, relative as the bar is; a comparison that must fail notes nothing."""

        def recorded(ours: Tensor, reference: Tensor, *args: Any, **options: Any) -> float:
            found = close(ours, reference, *args, **options)
            relative = found / max(1.0, float(reference.abs().max()))
            classes = self._entry().setdefault("classes", {})
            classes[self.reference] = max(relative, classes.get(self.reference, 0.0))
            return found

        return recorded

    def _note(self, key: str, values: list[str]) -> None:
        held = self._entry().setdefault(key, [])
        held += [value for value in dict.fromkeys(values) if value not in held]

    def _entry(self) -> dict[str, Any]:
        return self.families.setdefault(self.family, {})


def _resizes(change: Change) -> str:
    parts = getattr(change, "changes", (change,))
    return SIZES.get(type(parts[-1]).__name__, "")


def main(paths: list[str]) -> int:
    recorder = Recorder(json.loads(MEASURED.read_text())["families"] if paths and MEASURED.exists() else {})
    code = pytest.main(["-q", "-p", "no:cacheprovider", *(paths or [ALL])], plugins=[recorder])
    if code:
        print("nothing is written: a family does not give what its original gives", file=sys.stderr)
        return int(code)
    from mmformer.checkpoints.families import FAMILIES

    families = {}
    for family in FAMILIES:
        name = f"{family.library}/{family.name}"
        if (found := recorder.families.get(name)) and family.library != "mmformer":  # our own files have no original
            lists = {key: sorted(found.get(key, [])) for key in ("parts", "resizes", "converts")}
            classes = {key: float(f"{value:.2g}") for key, value in sorted(found.get("classes", {}).items())}
            families[name] = {**lists, "classes": classes}
    for key, reason in recorder.converted.items():
        if reason:
            print(f"{' '.join(key)}: {reason}")
    head = {"command": "python -m benchmarks.parity", "versions": {name: version(name) for name in LIBRARIES}}
    MEASURED.write_text(json.dumps(head | {"families": families}, indent=1) + "\n")
    print(f"{len(families)} of {len(FAMILIES)} families in {MEASURED}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
