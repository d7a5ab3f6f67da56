"""Whether the campaign sees it: the code that keeps a promise is taken out, and the block of that promise must fail.

    python -m tests.campaign.mutations

Each mutation is made in a copy of the repository; the copy without any must pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("mmformer", "tests", "configs", "train.py", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    """In a file, this becomes that; the block that must fail, and how much of it is run."""

    name: str
    file: str
    before: str
    after: str
    block: str
    share: float


CHECKPOINTING = "mmformer/training/checkpointing.py"
DECODE = "mmformer/datasets/decode.py"
MUTATIONS = (
    Mutation("without fsync of the file", CHECKPOINTING, "os.fsync(file.fileno())", "pass", "K2", 0.01),
    Mutation("without fsync of the folder", CHECKPOINTING, "        _sync_folder(path.parent)\n", "", "K2", 0.01),
    Mutation("without os.replace", CHECKPOINTING, "os.replace(temporary, path)\n", "pass\n", "K2", 0.01),
    Mutation(
        "written in place", CHECKPOINTING, 'temporary = path.with_name(f".{path.name}.tmp")', "temporary = path",
        "K2", 0.3,
    ),
    Mutation("without the hash check", CHECKPOINTING, "if known and (found", "if False and (found", "C1", 0.1),
    Mutation("with weights_only=False", CHECKPOINTING, "weights_only=True)", "weights_only=False)", "S1", 1.0),
    Mutation(
        "without the reseed of each step", "mmformer/training/module.py",
        'seed_device(counter_seed(self.seed, "step"', '(lambda *_: None)(counter_seed(self.seed, "step"', "K1", 0.03,
    ),
    Mutation("without the check of the header", DECODE, "image.width * image.height > max_pixels", "False", "S1", 1.0),
    Mutation(
        "without the check of the length", DECODE, "if frames / rate > max_seconds:", "if False:", "S1", 1.0,
    ),
    Mutation(
        "without comparing checksums", "mmformer/datasets/integrity.py", "!= self.digest:", "== '':", "D1", 0.03,
    ),
    Mutation(
        "without the watch", "mmformer/datasets/watchdog.py", "if not child.connection.poll(self.left):",
        "if not child.connection.poll(self.left + 20):", "W1", 1.0,
    ),
)  # fmt: skip


def copied(folder: Path) -> None:
    """A copy of the repository, without what was built in it."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)


def mutate(folder: Path, mutation: Mutation) -> None:
    path = folder / mutation.file
    text = path.read_text()
    if mutation.before not in text:
        raise ValueError(f"{mutation.file} has no {mutation.before!r}: the mutation {mutation.name!r} is out of date")
    path.write_text(text.replace(mutation.before, mutation.after))


def red(folder: Path, block: str, share: float) -> tuple[bool, str]:
    """Whether a block fails in a folder, and its first lines."""
    command = [sys.executable, "-m", "tests.campaign", "--only", block, "--share", str(share), "--budget", "300"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or "trials in" not in done.stdout:
        raise RuntimeError(f"the campaign itself broke: {done.stdout[-500:]}{done.stderr[-1500:]}")
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("      ")]
    return done.returncode == 1, lines[0][:160] if lines else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="mutations whose name holds one of these")
    given = parser.parse_args()
    chosen = [m for m in MUTATIONS if not given.only or any(word in m.name for word in given.only)]
    bad = 0
    for share, block in dict.fromkeys((m.share, m.block) for m in chosen):
        bad += not _report(f"unchanged, {block}", None, block, share)
    for mutation in chosen:
        bad += not _report(mutation.name, mutation, mutation.block, mutation.share)
    print(f"{bad} of the mutations were not seen" if bad else "each mutation was seen")
    return 1 if bad else 0


def _report(name: str, mutation: Mutation | None, block: str, share: float) -> bool:
    """Run one, say what came of it; whether that is as it should be."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation_") as folder:
        copied(Path(folder))
        if mutation is not None:
            mutate(Path(folder), mutation)
        found, said = red(Path(folder), block, share)
    good = found == (mutation is not None)
    state = "red" if found else "green"
    print(f"{name:<34} {block} {state:<6}{'' if good else 'WRONG '} {time.monotonic() - started:5.0f} s  {said}")
    return good


if __name__ == "__main__":
    sys.exit(main())
