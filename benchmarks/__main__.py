"""List the benchmarks: `python -m benchmarks`."""

from __future__ import annotations

import ast
from pathlib import Path


def main() -> None:
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        if "python -m" in text:
            print(f"python -m benchmarks.{path.stem:<10} {text.splitlines()[0]}")


if __name__ == "__main__":
    main()
