"""Runs the tests marked `traced` in a second pytest, whose functions are not wrapped in checks of shapes.

torch.compile and torch.export trace Python, and cannot trace those checks.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MARK = "pytest.mark." + "traced"


def test_traced() -> None:
    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if MARK in path.read_text()]
    if not files:
        pytest.skip("no test is marked `traced`")
    command = [sys.executable, "-m", "pytest", "-m", "traced", "--jaxtyping-packages=", "--color=no", *files]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
