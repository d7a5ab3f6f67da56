"""The most memory that opening a run or a file and predicting one sample takes, in a process of its own.

    python -m mmformer.compress.peak PATH SAMPLE

SAMPLE is a pickle that `peak_memory` wrote. Imports nothing but what the path needs: a file runs without torch.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def peak_memory(path: Path, sample: Mapping[str, Any]) -> int:
    """Bytes of a fresh process, the interpreter and all libraries included, that predicts `sample`."""
    plain = {name: _plain(value) for name, value in sample.items() if name != "id"}
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with TemporaryDirectory() as folder:
        (file := Path(folder) / "sample").write_bytes(pickle.dumps(plain))
        command = [sys.executable, "-m", "mmformer.compress.peak", str(path.resolve()), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads, check=False)
    if done.returncode:
        raise RuntimeError(f"{path} could not be opened in a process of its own: {done.stderr.strip()[-400:]}")
    return int(done.stdout.split()[-1])


def _plain(value: Any) -> Any:
    """A text as it is, a file as its bytes."""
    if not hasattr(value, "open") or isinstance(value, Path):
        return str(value) if isinstance(value, Path) else value
    with value.open() as stream:
        return stream.read()


def _main(path: Path, sample: dict[str, Any]) -> None:
    if path.suffix in (".onnx", ".pte"):
        from mmformer.runtime import Runtime

        Runtime(path, threads=1).outputs([sample])
    elif path.suffix == ".pt2":
        from mmformer.compress.opened import OpenedFile

        OpenedFile(path).outputs([sample])
    else:
        from mmformer.compress.opened import OpenedRun

        OpenedRun(path).outputs([sample])
    print(_highest())


def _highest() -> int:
    """The most bytes that this process has had in memory."""
    status = Path("/proc/self/status")
    if status.is_file():  # not getrusage, which on Linux also counts what the parent had when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    _main(Path(sys.argv[1]), pickle.loads(Path(sys.argv[2]).read_bytes()))
