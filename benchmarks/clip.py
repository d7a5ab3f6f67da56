"""`experiment=clip` against open_clip of the same size: the same rows, the same CPU seconds, over seeds.

    uv run python -m benchmarks.clip --seconds 240 --seeds 0 1 2

Both see the batches of the same loader (same order, same augmentation, same words) in bf16, under AdamW with warm-up
and cosine. open_clip has its own architecture (patches and a class token, padded causal texts), its own loss and the
optimizer settings of its README, but the better of the learning rates given with --rates, tried on the first seed and
judged on validation. Ours gets as many steps as fit into the seconds, at the cost of a step that two short runs give;
theirs stops by the clock. CPU seconds are those of the process, all threads and the loader included; evaluation and
start are not. Recalls are in % of the test, the mean of both directions, beside chance.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
SIDE, CONTEXT = 48, 33
METRICS = ("r@1", "r@10", "mean_recall")
COMMON = ["experiment=clip", "data.loader.num_workers=0", "callbacks=default"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="CPU seconds of training, each side")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3], help="learning rates for open_clip")
    parser.add_argument("--patch", type=int, default=8, help="open_clip's patch size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/clip_peers"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = affordable(options)
    print(f"mmformer: {steps} steps in {options.seconds:.0f} CPU seconds", flush=True)
    tried = {rate: theirs(options, options.seeds[0], rate) for rate in options.rates}
    best = max(tried, key=lambda rate: tried[rate]["val_mean_recall"])
    print(f"open_clip: {tried[best]['steps']:.0f} steps; learning rate {best:g} of {options.rates}", flush=True)
    rows: dict[str, list[dict[str, float]]] = {"mmformer": [], "open_clip": []}
    for seed in options.seeds:
        rows["mmformer"].append(ours(options, seed, steps))
        rows["open_clip"].append(tried[best] if seed == options.seeds[0] else theirs(options, seed, best))
    print(f"{'':<12}" + "".join(f"{name:>16}" for name in METRICS) + "     parameters")
    for name, found in rows.items():
        cells = "".join(f"{spread([100 * row[metric] for row in found]):>16}" for metric in METRICS)
        print(f"{name:<12}{cells}   {found[0]['parameters'] / 1e6:.2f} M")
    ratio = mean(r["r@10"] for r in rows["mmformer"]) / mean(r["r@10"] for r in rows["open_clip"])
    print(f"R@10 of mmformer is {ratio:.2f} times open_clip's; chance {1000 / rows['mmformer'][0]['rows']:.2f}")


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" +- {stdev(values):.1f}" if len(values) > 1 else "")


def affordable(options: argparse.Namespace) -> int:
    """Our steps in the given seconds."""
    short, long = (cost(options, steps) for steps in (20, 120))
    return int(options.seconds / ((long - short) / 100))


def cost(options: argparse.Namespace, steps: int) -> float:
    """CPU seconds of a whole run that trains that long, without an evaluation."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    given = [
        f"trainer.max_steps={steps}",
        "test=false",
        "trainer.limit_val_batches=0",
        f"hydra.run.dir={options.folder}/cost_{steps}",
    ]
    train([*given, f"extras.threads={options.threads}"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train(overrides: list[str]) -> None:
    command = [sys.executable, "train.py", *COMMON, *overrides]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def ours(options: argparse.Namespace, seed: int, steps: int) -> dict[str, float]:
    folder = options.folder.resolve() / f"ours_{seed}"
    if not (folder / "metrics.json").exists():
        given = [f"hydra.run.dir={folder}", f"seed={seed}", f"trainer.max_steps={steps}"]
        train([*given, f"extras.threads={options.threads}"])
    found = json.loads((folder / "metrics.json").read_text())
    import mmformer

    model = mmformer.load(folder).model
    size = sum(p.numel() for p in model.parameters())
    return {name: found[f"test/{name}"] for name in METRICS} | {"parameters": size, "rows": len(split("test", seed))}


def theirs(options: argparse.Namespace, seed: int, rate: float) -> dict[str, float]:
    path = options.folder / f"theirs_{seed}_{rate:g}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(Peer(options, seed, rate).run()))
    return json.loads(path.read_text())


def data(seed: int) -> Any:
    """The data module of the experiment."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", [*COMMON, f"seed={seed}", f"paths.root={ROOT}", "paths.run=runs/x"])
    module = instantiate(config.data.module, _convert_="all")
    module.setup()
    return module


def split(name: str, seed: int) -> Any:
    return data(seed).splits[name]


class Peer:
    """open_clip's model, loss and usual optimizer on our batches."""

    def __init__(self, options: argparse.Namespace, seed: int, rate: float):
        import open_clip

        torch.manual_seed(seed)
        self.data, self.rate, self.seconds = data(seed), rate, options.seconds
        words = self.data.tokenizer.vocab_size
        vision = open_clip.CLIPVisionCfg(layers=3, width=192, head_width=64, patch_size=options.patch, image_size=SIDE)
        text = open_clip.CLIPTextCfg(context_length=CONTEXT, vocab_size=words + 1, width=192, heads=3, layers=3)
        self.end = words  # pooled where the id is highest, as open_clip's own tokenizer has it
        self.model = open_clip.model.CLIP(192, vision, text)
        self.loss = open_clip.loss.ClipLoss()
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def run(self) -> dict[str, float]:
        self.model.train()
        start, steps, spent = time.process_time(), 0, 0.0
        while spent < self.seconds:
            for batch in self.data.train_dataloader():
                if (spent := time.process_time() - start) >= self.seconds:
                    break
                self.step(batch, spent / self.seconds)
                steps += 1
            self.data._place = (steps // self.data.batches_per_epoch(), 0)  # the next epoch, as our trainer has it
        size = sum(p.numel() for p in self.model.parameters())
        judged = {f"val_{name}": value for name, value in self.judge("val").items()} | self.judge("test")
        return judged | {"steps": steps, "parameters": size}

    def step(self, batch: Any, progress: float) -> None:
        rate = self.rate * min(1.0, progress / 0.05) * (0.51 + 0.49 * math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images, texts = self.dense(batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(*self.model(images, texts))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))

    def dense(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Pictures in the middle of a white square of three channels, and padded ids."""
        images = torch.full((len(batch), 3, SIDE, SIDE), 1.0)
        for row, item in batch.inputs["image"].items():
            height, width = item.shape[:2]
            top, left = (SIDE - height) // 2, (SIDE - width) // 2
            images[row, :, top : top + height, left : left + width] = (item.float() / 255).permute(2, 0, 1)
        texts = torch.zeros(len(batch), CONTEXT, dtype=torch.long)
        for row, ids in batch.inputs["text"].items():
            texts[row, : len(ids)], texts[row, len(ids)] = ids, self.end
        return (images - 0.5) / 0.5, texts

    @torch.no_grad()
    def judge(self, name: str) -> dict[str, float]:
        from mmformer.objectives.contrastive import RetrievalMeter

        self.model.eval()
        meter = RetrievalMeter(["text", "image"])
        for batch in getattr(self.data, f"{name}_dataloader")():
            images, texts = self.dense(batch)
            with torch.autocast("cpu", torch.bfloat16):
                image, text, _ = self.model(images, texts)
            meter.update({"image": image.float(), "text": text.float()}, batch)
        found = meter.compute()
        return {key: found[key] for key in METRICS}


if __name__ == "__main__":
    main()
