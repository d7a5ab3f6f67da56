"""What a first training on icons is worth for emoji: from scratch, all weights, or low-rank adapters, over seeds.

    uv run python -m benchmarks.transfer --steps 100 --seeds 0 1 2

Trains pictures and names of icons once (`experiment=clip`, in colour, so that the encoder fits), then pictures and
names of emoji from there: each way with the same steps and rows. The test holds names that no training row has. Texts
are read byte by byte, on all sides: words cut for icons are not those of emoji, and cost more than they bring.
Figures are recalls in % of the test, the mean over both directions, beside chance.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

WAYS = {
    "from scratch": [],
    "all weights": ["pretrained={source}"],
    "adapters": ["pretrained={source}", "finetune=lora"],
}
COMMON = [
    "data.features.image.channels=3",
    "data/tokenizer=bytes",
    "~data.tokenizer.vocab_size",
    "data.features.text.max_length=64",
]
METRICS = ("test/r@1", "test/r@10", "test/mean_recall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps on emoji, each way")
    parser.add_argument("--source-steps", type=int, default=700, help="steps on icons")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/transfer"))
    options = parser.parse_args()
    common = [f"extras.threads={options.threads}", "trainer.limit_val_batches=1", *COMMON]
    source = options.folder / "icons"
    steps = [f"trainer.max_steps={options.source_steps}"]
    train(source, ["experiment=clip", "seed=0", *common, *steps])
    print(f"{'emoji':<14} {'r@1':>12} {'r@10':>12} {'mean':>12}   after {options.steps} steps, seeds {options.seeds}")
    for way, given in WAYS.items():
        rows = []
        for seed in options.seeds:
            folder = options.folder / f"{way.replace(' ', '_')}_{seed}"
            steps = [f"trainer.max_steps={options.steps}", "data.columns.audio=null"]
            start = [word.format(source=source) for word in given]
            rows.append(train(folder, ["experiment=imagebind", f"seed={seed}", *common, *steps, *start]))
        print(f"{way:<14} " + " ".join(f"{spread([row[name] for row in rows]):>12}" for name in METRICS))


def train(folder: Path, overrides: list[str]) -> dict[str, float]:
    """One run in its own folder, and its metrics; one that is finished already is kept."""
    metrics = folder / "metrics.json"
    if not metrics.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "train.py", f"hydra.run.dir={folder}", *overrides]
        with (folder / "screen.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
    return json.loads(metrics.read_text())


def spread(values: list[float]) -> str:
    """Mean and standard deviation in %."""
    shares = [100 * value for value in values]
    return f"{mean(shares):.1f}" + (f" +- {stdev(shares):.1f}" if len(shares) > 1 else "")


if __name__ == "__main__":
    main()
