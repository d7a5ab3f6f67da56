"""Find the nearest among many vectors: the index, exact and approximate, beside plain NumPy in the same run.

    uv run python -m benchmarks.search --rows 1000000 --dim 512 --threads 2

Vectors are clustered and fill few of their dimensions, as embeddings do: 1000 centres with as much noise around them,
in 32 dimensions that a random map spreads over all; queries are drawn in the same way. Recall@10 is the share of the
ten nearest rows, by the exact search in float32, that a search finds. Memory is what the process holds in RAM more than
before. Times are of the wall clock, so run it alone; "CPU ms" is the processor time of a query of the batch, which
waiting for others leaves out.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.timing import machine
from mmformer.search import Index
from mmformer.search.nearest import Found

MODEL = "benchmark:shared"
TOP = 10
CENTRES, INNER = 1000, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=1000, help="in one batch, for queries a second")
    parser.add_argument("--single", type=int, default=20, help="one at a time, for the time of a query")
    parser.add_argument("--probes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the index is saved; by default a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    options.device = torch.device("cpu")
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as temporary:
        rows = measure(options, options.folder or Path(temporary))
    show(rows, options)


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, float | str]]:
    """A row of figures for each way to search."""
    vectors, queries = clustered(options.rows, options.queries, options.dim)
    ids = {"id": [str(i) for i in range(options.rows)]}
    start = memory()
    index, built = timed(lambda: Index.build(vectors, ids, model=MODEL))
    facts = {"build s": built, "memory MB": memory() - start}
    wanted, _ = timed(lambda: exact(index, queries))
    out = [speed("exact, float32", lambda q: exact(index, q), queries, wanted, options) | facts]
    plain = vectors.numpy()
    out.append(speed("NumPy, matmul and argpartition", lambda q: by_numpy(plain, q), queries, wanted, options))
    start = memory()
    fast, trained = timed(index.approximate)
    facts = {"build s": trained, "memory MB": memory() - start}
    for probes in options.probes:
        out.append(
            speed(
                f"approximate, {probes} of {len(fast.inverted.tensors()['sizes'])} lists",
                lambda q, probes=probes: fast.nearest(q, TOP, model=MODEL, probes=probes),
                queries,
                wanted,
                options,
            )
            | facts
        )
    _, saved = timed(lambda: fast.save(folder))
    del index, fast, vectors, plain
    opened, loaded = timed(lambda: Index.load(folder))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"saved in {saved:.1f} s, {size:,.0f} MB; opened in {loaded:.1f} s")
    found = {"build s": loaded}
    out.append(
        speed("approximate, opened", lambda q: opened.nearest(q, TOP, model=MODEL), queries, wanted, options) | found
    )
    more, added = timed(lambda: opened.add(queries, {"id": [f"q{i}" for i in range(len(queries))]}, model=MODEL))
    _, written = timed(lambda: more.save(folder))
    print(f"{len(queries):,} rows added in {added:.2f} s, saved in {written:.2f} s")
    return out


def clustered(rows: int, queries: int, dim: int) -> tuple[Tensor, Tensor]:
    """Unit vectors around common centres."""
    torch.manual_seed(0)
    centres, spread = torch.randn(CENTRES, INNER), torch.randn(INNER, dim)
    out = torch.empty(rows + queries, dim)
    for part in out.split(100_000):
        inner = centres[torch.randint(CENTRES, (len(part),))] + torch.randn(len(part), INNER)
        part.copy_(normalize(inner @ spread, dim=1))
    return out[:rows], out[rows:].clone()


def exact(index: Index, queries: Tensor) -> Found:
    return index.nearest(queries, TOP, model=MODEL)


def by_numpy(vectors: np.ndarray, queries: Tensor) -> Found:
    """The few lines that one would write without an index; 64 queries at a time, as all scores must fit."""
    best = []
    for chunk in np.array_split(queries.numpy(), -(-len(queries) // 64)):
        scores = chunk @ vectors.T
        few = np.argpartition(-scores, TOP, axis=1)[:, :TOP]
        order = np.argsort(-np.take_along_axis(scores, few, 1), 1)
        best.append(np.take_along_axis(few, order, 1))
    rows = torch.from_numpy(np.concatenate(best))
    return Found(rows=rows, scores=torch.zeros(rows.shape))


def speed(
    name: str, search: Callable[[Tensor], Found], queries: Tensor, wanted: Found, options: argparse.Namespace
) -> dict[str, float | str]:
    """Queries a second in one batch, the median time of a query alone, and the recall."""
    processor = time.process_time()
    found, batch = timed(lambda: search(queries))
    processor = time.process_time() - processor
    single = [timed(lambda i=i: search(queries[i : i + 1]))[1] for i in range(options.single)]
    recall = (found.rows[:, :, None] == wanted.rows[:, None]).any(1).double().mean().item()
    print(f"{name}: {len(queries) / batch:.0f} queries/s", flush=True)
    return {
        "search": name,
        "queries/s": len(queries) / batch,
        "CPU ms": 1e3 * processor / len(queries),
        "one query ms": 1e3 * float(np.median(single)),
        "recall@10": recall,
    }


def timed(work: Callable[[], object]) -> tuple:
    """What it gives, and the seconds it took."""
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def memory() -> float:
    """MB that this process holds in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def show(rows: list[dict[str, float | str]], options: argparse.Namespace) -> None:
    """Print a table, and write the figures where `--json` says."""
    columns = ["search", "build s", "queries/s", "CPU ms", "one query ms", "recall@10", "memory MB"]
    table = Table(*columns, title=f"{options.rows:,} vectors of {options.dim}, {options.threads} threads")
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        table.add_row(*[f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in cells])
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(options), "results": rows}, indent=1))


if __name__ == "__main__":
    main()
