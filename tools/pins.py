"""Write the exact version of everything that resolves into `[tool.uv] constraint-dependencies` of pyproject.toml.

    uv run python tools/pins.py            # keep the versions that are pinned, add and drop what changed
    uv run python tools/pins.py --upgrade  # take the newest versions that the declared bounds allow

The project commits no uv.lock, because that file records the addresses of package hosts. `uv run` honours these pins
without one. They hold for every Python and platform that is supported: where versions differ, a marker says so.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START = "constraint-dependencies = [\n"
END = "]\n"


def split(pyproject: str) -> tuple[str, str, str]:
    """The text before the pins, the pins, and the text behind them."""
    before, found, rest = pyproject.partition(START)
    pins, _, after = rest.partition("\n" + END) if not rest.startswith(END) else ("", "", rest.removeprefix(END))
    if not found:
        raise ValueError(f"pyproject.toml has no line {START.strip()!r}: add it, with a closing ], under [tool.uv]")
    return before + START, pins, END + after


def resolve(pyproject: str) -> list[str]:
    """Requirements of the form `name==version ; marker` for all that uv resolves, every extra and group included."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(pyproject)
        for name in ("README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        command = ["uv", "export", "--quiet", "--format=requirements.txt", "--all-extras", "--all-groups"]
        plain = ["--no-hashes", "--no-annotate", "--no-header", "--no-emit-project"]
        lines = subprocess.run([*command, *plain], cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
    pins = [re.sub(r"\s+;\s+", " ; ", line.strip()) for line in lines.splitlines()]
    wrong = [pin for pin in pins if "==" not in pin.split(";")[0] or "@" in pin]
    if wrong:
        raise ValueError(f"{wrong} are not exact versions: declare them in a form that a package index can serve")
    return sorted(pins)


def main() -> None:
    """Rewrite pyproject.toml and say what changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="forget the present pins and take the newest versions")
    upgrade = parser.parse_args().upgrade
    path = ROOT / "pyproject.toml"
    before, old, after = split(path.read_text())
    pins = [f"  {json.dumps(pin)}," for pin in resolve(before + ("" if upgrade else old + "\n") + after)]
    path.write_text(before + "\n".join(pins) + "\n" + after)
    was = set(old.splitlines())
    for sign, lines in (("-", was - set(pins)), ("+", set(pins) - was)):
        for line in sorted(lines):
            print(sign, line.strip())
    print(f"{len(pins)} pins in {path.name}")


if __name__ == "__main__":
    main()
