"""What the contrastive experiments find among names they never saw, beside chance and beside what is left out of them.

    uv run python -m benchmarks.retrieval icons    # pictures and names: clip, siglip, no augmentation
    uv run python -m benchmarks.retrieval emoji    # pictures, names and spoken names: all pairs, or those with pictures

Each is `train.py experiment=...`, the same steps for all of a set. Figures are recalls in % of the test, by direction:
`t2i` finds the picture of a text. By chance one in n is found at the first place. A run that is finished is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.transfer import spread, train

SETS = {
    "icons": {
        "clip": ["experiment=clip"],
        "siglip": ["experiment=siglip"],
        "clip, pictures as they are": ["experiment=clip", "data.augment.transforms.image=null"],
    },
    "emoji": {
        "imagebind": ["experiment=imagebind"],
        "pairs with pictures alone": ["experiment=imagebind", "+module.objectives.contrastive.anchor=image"],
        "no spoken names": ["experiment=imagebind", "data.columns.audio=null"],
        "no pictures": ["experiment=imagebind", "data.columns.image=null"],
    },
}
DIRECTIONS = ("i2t", "t2i", "a2t", "t2a", "i2a", "a2i")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=list(SETS))
    parser.add_argument("--only", nargs="+", help="some of the runs")
    parser.add_argument("--steps", type=int, help="those of the experiment where not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/retrieval"))
    options = parser.parse_args()
    table = Table("", *(f"{way} {key}" for way in DIRECTIONS for key in ("R@1", "R@10")), title=options.set)
    steps = [f"trainer.max_steps={options.steps}"] if options.steps else []
    rows = 0
    for name, given in SETS[options.set].items():
        if options.only and name not in options.only:
            continue
        found = []
        for seed in options.seeds:
            folder = options.folder / options.set / f"{name.replace(',', '').replace(' ', '_')}_{seed}"
            found.append(train(folder, [*given, f"seed={seed}", f"extras.threads={options.threads}", *steps]))
            rows = max(rows, len(pq.read_table(folder / "predictions.parquet", columns=["id"])))
        table.add_row(name, *(cell(found, f"{way}_{key}") for way in DIRECTIONS for key in ("r@1", "r@10")))
    table.add_row("chance", *([f"{100 / rows:.1f}", f"{1000 / rows:.1f}"] * len(DIRECTIONS) if rows else []))
    Console(width=200).print(table)


def cell(found: list[dict[str, float]], key: str) -> str:
    """A metric over seeds; runs of two modalities have no letters for the others."""
    values = [metrics[f"test/{key}"] for metrics in found if f"test/{key}" in metrics]
    return spread(values) if values else ""


if __name__ == "__main__":
    main()
