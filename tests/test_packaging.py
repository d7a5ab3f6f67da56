"""The pins cover what is installed, and the tree holds no package host, no path of a machine and no secret."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = [Requirement(line) for line in PYPROJECT["tool"]["uv"]["constraint-dependencies"]]
DEVELOPMENT = [Requirement(line) for line in PYPROJECT["dependency-groups"]["dev"]]

# Written in pieces, so that this file holds none of them.
HOSTS = [
    ".".join(pieces)
    for pieces in [("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"), ("npmjs", "org")]
]
FORBIDDEN = {
    "a package host": "|".join(map(re.escape, HOSTS)) + r"|https?://[^\s\"']+/(simple|packages|whl)\b",
    "an index option": r"--(extra-)?index-ur[l]|--find-link[s]",
    "a path of a machine": r"(?<![\w.:~/])/(home|root|work|Users|farm)/\w",
    "a password in an address": r"://[^\s/:@\"'{}<>]+:[^\s/@\"'{}<>]+@",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a token": r"\b(ghp|gho|github_pat|glpat|hf|sk|xox[bap])[_-][A-Za-z0-9_]{20,}|\bAKIA[0-9A-Z]{16}\b",
    "a key of a tracker": r"(?i)(api_?key|secret|token)[\"']?\s*[=:]\s*[\"']?[0-9a-f]{32,}",
}


@cache
def tracked() -> list[Path]:
    """Files of the repository: what git has, and what it would take."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to know which files belong to the project")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def installed() -> Iterator[metadata.Distribution]:
    """Everything the project needs here, transitively, as far as it is installed."""
    seen: set[tuple[str, str]] = set()
    waiting = [("mmformer", extra) for extra in ("", *PYPROJECT["project"]["optional-dependencies"])]
    waiting += [(canonicalize_name(need.name), extra) for need in DEVELOPMENT for extra in ("", *need.extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if not extra and name != "mmformer":
            yield found
        for need in map(Requirement, found.requires or []):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(need.name), more) for more in ("", *need.extras)]


def test_pins_are_exact() -> None:
    loose = [str(pin) for pin in PINS if [rule.operator for rule in pin.specifier] != ["=="] or pin.url]
    assert not loose, f"run tools/pins.py: {loose}"


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment that `uv run` makes from the pins")
def test_pins_cover_the_environment() -> None:
    here = {canonicalize_name(pin.name): pin for pin in PINS if pin.marker is None or pin.marker.evaluate()}
    wrong = []
    for found in installed():
        pin = here.get(canonicalize_name(found.name))
        if pin is None or not pin.specifier.contains(found.version, prereleases=True):
            wrong.append(f"{found.name} {found.version} is installed, pinned is {pin}")
    assert not wrong, "`uv run python tools/pins.py` writes the pins, `uv sync` installs them:\n" + "\n".join(wrong)


def test_declared_dependencies_are_pinned() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    declared = [Requirement(line) for lines in [PYPROJECT["project"]["dependencies"], *extras] for line in lines]
    pinned = {canonicalize_name(pin.name): pin for pin in PINS}
    for need in [*declared, *DEVELOPMENT]:
        pin = pinned.get(canonicalize_name(need.name))
        assert pin is not None, f"{need} has no pin: run tools/pins.py"
        version = next(iter(pin.specifier)).version
        assert need.specifier.contains(version, prereleases=True), f"{need} excludes its pin {pin}: run tools/pins.py"


def test_lock_file_stays_out() -> None:
    assert ROOT / "uv.lock" not in tracked()
    ignored = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", "uv.lock"], cwd=ROOT)
    assert ignored.returncode == 0, "uv.lock records the addresses of package hosts: keep it in .gitignore"


@pytest.mark.parametrize("what", FORBIDDEN)
def test_tree_holds_no(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    wrong = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            if pattern.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, f"{what} stands in:\n" + "\n".join(wrong)


def test_files_are_small() -> None:
    large = {path.name: size for path in tracked() if (size := path.stat().st_size) > 5 * 2**20}
    assert not large, f"files above 5 MiB, in bytes: {large}"


def test_version_is_written_once() -> None:
    assert metadata.version("mmformer") == PYPROJECT["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PYPROJECT['project']['version']}\n" in citation
    assert f"\n## {PYPROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_supported_pythons_agree() -> None:
    lowest = "py" + PYPROJECT["project"]["requires-python"].split(",")[0].removeprefix(">=").replace(".", "")
    assert PYPROJECT["tool"]["ruff"]["target-version"] == lowest
    assert "py" + PYPROJECT["tool"]["pyright"]["pythonVersion"].replace(".", "") == lowest
