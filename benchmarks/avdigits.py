"""One model of picture and sound against the product of two models of one each, over seeds.

    uv run python data/avdigits/prepare.py ../shared/data/avdigits
    uv run python -m benchmarks.avdigits --seeds 0 1 2 --jobs 2

Starts `train.py experiment=avdigits` three times a seed: with both modalities, with pictures only, with sounds only.
The product multiplies the posteriors of the two twins, which is the best one can do with models that never met
(the classes are equally frequent and the noises independent). Chance is 10 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pyarrow.parquet as pq

VARIANTS = {"joint": [], "picture": ["data.columns.audio=null"], "sound": ["data.columns.image=null"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/avdigits_seeds"))
    options = parser.parse_args()
    runs = [(options.folder / f"{name}_{seed}", name, seed) for seed in options.seeds for name in VARIANTS]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda run: train(*run), runs))
    rows = [figures(options.folder, seed) for seed in options.seeds]
    for key in rows[0]:
        values = [100 * row[key] for row in rows]
        spread = f" +- {stdev(values):.1f}" if len(values) > 1 else ""
        print(f"{key:<28} {mean(values):5.1f}{spread}   {'  '.join(f'{value:.1f}' for value in values)}")


def train(folder: Path, name: str, seed: int) -> None:
    """One run in its own folder; one that is finished already is kept."""
    if (folder / "metrics.json").exists():
        return
    given = [f"hydra.run.dir={folder}", f"seed={seed}", "extras.threads=1", *VARIANTS[name]]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "screen.log").open("w") as log:
        subprocess.run([sys.executable, "train.py", "experiment=avdigits", *given], check=True, stdout=log, stderr=log)


def figures(folder: Path, seed: int) -> dict[str, float]:
    """Test accuracies of one seed."""
    joint, picture, sound = (posteriors(folder / f"{name}_{seed}") for name in VARIANTS)
    metrics = json.loads((folder / f"joint_{seed}" / "metrics.json").read_text())
    ids = sorted(joint)
    target = np.array([joint[i][0] for i in ids])

    def accuracy(*sources: dict[str, tuple[int, np.ndarray]]) -> float:
        product = sum(np.log(np.array([source[i][1] for i in ids]) + 1e-12) for source in sources)
        return float((np.argmax(product, 1) == target).mean())

    return {
        "joint": accuracy(joint),
        "product of the twins": accuracy(picture, sound),
        "picture twin": accuracy(picture),
        "joint, picture only": metrics["test/acc_i"],
        "sound twin": accuracy(sound),
        "joint, sound only": metrics["test/acc_a"],
    }


def posteriors(run: Path) -> dict[str, tuple[int, np.ndarray]]:
    """The target and the probabilities of each test row."""
    table = pq.read_table(run / "predictions.parquet", columns=["id", "target", "probabilities"])
    ids, targets, shares = (table.column(name).to_pylist() for name in table.column_names)
    return {i: (int(t), np.array(p)) for i, t, p in zip(ids, targets, shares, strict=True)}


if __name__ == "__main__":
    main()
