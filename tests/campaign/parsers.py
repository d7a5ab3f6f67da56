"""Random bytes as manifests and as files of checksums: an error that says so, and nothing else."""

from __future__ import annotations

import io
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from mmformer.datasets import integrity, labels, splits, tables
from mmformer.datasets import manifest as manifests
from mmformer.datasets.integrity import read_checksums
from mmformer.datasets.manifest import read_manifest
from mmformer.datasets.tables import ManifestError
from tests.campaign.trials import Outcome, Trial, attempt, folder, in_fork, part

MUTATIONS, SECONDS = 400, 30
Target = Callable[[Path, bytes], None]


def manifest(place: Path, data: bytes) -> None:
    """A manifest of these bytes; the first says of which kind."""
    suffix = (".csv", ".tsv", ".jsonl", ".parquet", ".zip")[data[0] % 5 if data else 0]
    path = place / f"rows{suffix}"
    path.write_bytes(data[1:])
    try:
        rows = read_manifest(path)
        for row in range(min(3, len(rows))):
            rows.id(row)
            for name in rows.modalities:
                rows.where(name, row)
    except ManifestError:
        return


def checksums(place: Path, data: bytes) -> None:
    """A file of checksums of these bytes."""
    path = place / "x.sha256"
    path.write_bytes(data)
    try:
        read_checksums(path)
    except ManifestError:
        return


TARGETS: dict[str, Target] = {"manifest": manifest, "checksums": checksums}


def seeds() -> dict[str, list[bytes]]:
    """Valid files, from which others are made."""
    table = pa.table({"id": ["a", "b"], "text": ["x", None], "image": [b"1", b"2"], "label": [1, 2]})
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream)
    csv = b'id,split,text,image,label\n1,train,"a ""b""\nc",1.png,x\n2,val,d,2.png,y\n'
    lines = b"".join(json.dumps({"id": i, "text": "t", "label": [1, "a"][i % 2]}).encode() + b"\n" for i in range(4))
    sums = b"0" * 64 + b"  a.png\n" + b"\\" + b"1" * 64 + b"  b\\nc\n"
    return {
        "manifest": [b"\0" + csv, b"\1" + csv.replace(b",", b"\t"), b"\2" + lines, b"\3" + stream.getvalue()],
        "checksums": [sums],
    }


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few random edits: bytes changed, cut out, doubled, or put in."""
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, size = draw.randrange(len(data) + 1), draw.choice((1, 2, 8, 40))
        new = draw.choice((b"", draw.randbytes(size), data[at : at + size] * 2, b'"', b"\n", b",", b"\xff", b"\0"))
        data = data[:at] + new + data[at + draw.choice((0, len(new), size)) :]
    return data


def many(place: Path, name: str, count: int, seed: int) -> str | None:
    """Try mutations of the seeds; the first that ends otherwise than in its error."""
    draw = random.Random(seed)
    for i in range(count):
        data = mutated(draw.choice(seeds()[name]), draw)
        try:
            TARGETS[name](place, data)
        except Exception as error:
            return f"mutation {i}: {type(error).__name__}: {error} of {data!r}"
    return None


def fuzzed(place: Path, name: str, seconds: int) -> str | None:
    """The same by atheris, which looks where the code goes; a find ends this process."""
    import atheris

    corpus = place / "corpus"
    corpus.mkdir()
    for i, data in enumerate(seeds()[name]):
        (corpus / str(i)).write_bytes(data)
    os.chdir(place)
    for module in (integrity, labels, manifests, splits, tables):
        for function in vars(module).values():
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                atheris.instrument_func(function)
    target = partial(TARGETS[name], place)
    options = [f"-max_total_time={seconds}", "-max_len=4096", "-rss_limit_mb=4000", "-timeout=20", str(corpus)]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        atheris.Setup([sys.argv[0], *options], target)
        atheris.Fuzz()  # ends the process: 0 when nothing was found
    return "atheris came back"


def _in_atheris(place: Path, name: str, seconds: int) -> str | None:
    """What atheris found in a fork, which it ends itself."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            fuzzed(place, name, seconds)
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if not status:
        return None
    finds = [path.read_bytes()[:500] for path in place.glob("crash-*")]
    return f"atheris ended with status {status}: {finds}"


def trials(share: float, seed: int) -> Iterator[Outcome]:
    """Both parsers, by mutations of valid files (ten portions each), and for half a minute each by atheris."""
    for name in TARGETS:
        for i in part(range(10), share):
            with folder("D4") as place:
                work: Any = partial(many, place, name, MUTATIONS, seed * 1000 + i)
                yield attempt(f"{name}, {MUTATIONS} mutations ({i})", partial(in_fork, work))
    for name in TARGETS:
        if find_spec("atheris") is None:
            why = "atheris is not installed (pip install atheris; it has wheels for Linux)"
            yield Trial(name=f"{name}, atheris", skipped=True, detail=why)
            continue
        with folder("D4") as place:
            yield attempt(f"{name}, atheris", partial(_in_atheris, place, name, max(1, round(SECONDS * share))))
