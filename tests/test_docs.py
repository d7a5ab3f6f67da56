"""The README and the pages under docs/ do what they show.

The language of a fenced block says what happens to it here, in a fresh folder for each page that has the checkout's
files and its own `runs/`:

    ```python               run as a script
    ```console              its lines that start with `$ ` are run, and must exit with 0
    ```python title="a.py"  written to that file, as a reader would; any language
    ```sh and ```py         not run: installs, sketches, what needs a device or takes minutes; but every
                            `python train.py` of it must compose

`uv run x` is run as `x` of this environment. Words behind `console` are added to every `python train.py` of the block,
so that it takes a few steps and not the whole training; a reader does not see them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\w+)(?P<words>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")

INSTALLED = {"python", "pytest", "mmformer", "tensorboard", "ruff"}


class Block(NamedTuple):
    """A fenced block of a page: its language, the words behind it, its text, and the line where it starts."""

    language: str
    words: str
    body: str
    line: int

    @property
    def title(self) -> str | None:
        """The file that the block is the content of."""
        found = re.search(r'title="([^"]+)"', self.words)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(found["language"], found["words"].strip(), found["body"], text.count("\n", 0, found.start()) + 1)
        for found in FENCE.finditer(text)
    ]


def is_run(block: Block) -> bool:
    return block.title is None and block.language in {"python", "console"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the checkout, where what a page writes is thrown away."""
    for name in ("data", "mmformer", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "train.py", tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")  # a page adds files to it
    uv = tmp_path / ".bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(
        '#!/bin/sh\n[ "$1" = run ] || exit 64\nshift\n'
        'if [ "$1 $2" = "python train.py" ]; then exec "$@" $EXTRA; fi\nexec "$@"\n'
    )
    uv.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_run, blocks(page)))], ids=lambda p: p.name)
def test_page_runs(page: Path, checkout: Path) -> None:
    path = os.pathsep.join([str(checkout / ".bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    for block in blocks(page):
        if block.title:
            file = checkout / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.body)
            continue
        if not is_run(block):
            continue
        if block.language == "python":
            script = f"python - <<'END_OF_BLOCK'\n{block.body}END_OF_BLOCK\n"
        else:
            script = "\n".join(line[2:] for line in block.body.splitlines() if line.startswith(("$ ", "> ")))
        environment = os.environ | {"PATH": path, "EXTRA": block.words, "OMP_NUM_THREADS": "2"}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True
        )
        where = f"{page.relative_to(ROOT)}:{block.line}"
        assert done.returncode == 0, f"{where}: exit {done.returncode}\n{script}\n{done.stdout}\n{done.stderr}"


def shown_overrides() -> list[list[str]]:
    """The overrides of every `python train.py` that is shown and not run."""
    lines = [line for page in PAGES for b in blocks(page) if b.language == "sh" for line in b.body.splitlines()]
    commands = [line.partition("uv run python train.py")[2] for line in lines if "uv run python train.py" in line]
    return [words for command in commands if (words := shlex.split(command, comments=True)) and "<" not in command]


@pytest.mark.parametrize("overrides", shown_overrides(), ids=" ".join)
def test_shown_command_composes(overrides: list[str]) -> None:
    command = [sys.executable, "train.py", *map(first_of_sweep, overrides), "--cfg", "job"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def first_of_sweep(override: str) -> str:
    """`lr=1e-4,1e-3` as its first run has it: `lr=1e-4`."""
    return override if "[" in override else override.split(",")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not dead, f"{page.relative_to(ROOT)} links to {dead}"


def test_a_new_modality_takes_sixty_lines() -> None:
    page = ROOT / "docs" / "new-modality.md"
    written = [line for block in blocks(page) if block.title for line in block.body.splitlines() if line.strip()]
    assert 0 < len(written) <= 60, f"{len(written)} lines outside the package, at most 60"


def test_commands_use_uv() -> None:
    wrong = [
        f"{page.relative_to(ROOT)}:{block.line}: {line}"
        for page in PAGES
        for block in blocks(page)
        if block.language in {"console", "sh"}
        for line in block.body.splitlines()
        if (words := shlex.split(line.removeprefix("$ "), comments=True)) and words[0] in INSTALLED
    ]
    assert not wrong, f"a reader who only has pip types `uv run ...`: {wrong}"
