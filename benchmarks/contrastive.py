"""Streamed contrastive losses against open_clip's, forward and backward; and a batch encoded in chunks.

    python -m benchmarks.contrastive --threads 2

Memory is what the highest resident set of a fresh process exceeds that before the step (Linux), after a small step
that loads the libraries; on a GPU, what the allocator has given out at most.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import run

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.timing import Timings, interleave, parse_args, show
from mmformer.batch import Batch, Ragged
from mmformer.encoders import Encoder, TextEmbedder, mel_patches
from mmformer.heads import UnitHead
from mmformer.losses.contrastive import info_nce, sigmoid
from mmformer.model import Encoded, Model
from mmformer.nn import Attention, Block, Sinusoid, Transformer
from mmformer.objectives import Contrastive

Gradients = tuple[Tensor | None, ...]
Step = Callable[[int], Gradients]

SIZE, DIM = 8192, 512
SAMPLES, CHUNK = 256, 16


def losses() -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """Ours and open_clip's, of a, b, scale and bias."""
    from open_clip.loss import ClipLoss, SigLipLoss

    clip = ClipLoss()
    return {
        "open_clip ClipLoss": lambda a, b, scale, bias: clip(a, b, scale),
        "info_nce": info_nce,
        "open_clip SigLipLoss": SigLipLoss(),
        "sigmoid": sigmoid,
    }


def pairs(size: int, device: torch.device) -> list[Tensor]:
    """Unit vectors, half of each like its partner, with a scale and a bias."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(size, DIM, generator=draw)
    rows = [F.normalize(common + torch.randn(size, DIM, generator=draw), dim=-1) for _ in range(2)]
    return [x.to(device).requires_grad_() for x in (*rows, torch.tensor(20.0), torch.tensor(-10.0))]


def loss_step(name: str, size: int, device: torch.device) -> Step:
    """Forward and backward of one loss."""
    loss, inputs = losses()[name], pairs(size, device)
    return lambda number: torch.autograd.grad(loss(*inputs), inputs, allow_unused=True)


def towers(chunk: int | None) -> tuple[Model, Contrastive]:
    torch.manual_seed(0)
    layers = [partial(Block, attention=partial(Attention, num_heads=4), dropout=0.0)]
    encoders = {
        "text": Encoder(TextEmbedder(256, 1000, Sinusoid), [Transformer(256, 4, layers)]),
        "audio": Encoder(mel_patches(256, 40, 4, Sinusoid), [Transformer(256, 4, layers)]),
    }
    heads = {name: UnitHead(256, 128) for name in encoders}
    return Model(encoders, None, heads), Contrastive(list(encoders), info_nce, 20.0, chunk=chunk)


def texts_and_sounds(size: int, device: torch.device) -> Batch:
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 1000, (32,), generator=draw) for _ in range(size)]
    sounds = [torch.randn(256, 40, generator=draw) for _ in range(size)]
    inputs = {"text": Ragged.stack(texts, range(size)), "audio": Ragged.stack(sounds, range(size), 1)}
    return Batch(ids=tuple(map(str, range(size))), inputs=inputs).to(device)


def model_step(chunk: int | None, size: int, device: torch.device) -> Step:
    """Forward and backward of two towers, all samples at a time or `chunk`."""
    model, objective = towers(chunk)
    model.to(device)
    objective.to(device)
    batch = texts_and_sounds(size, device)

    def step(number: int) -> Gradients:
        encoded = model.encode(batch) if chunk is None else Encoded({}, size)
        (loss,) = objective(model, encoded, batch).values()
        return torch.autograd.grad(loss, list(model.parameters()))

    return step


def make(name: str, size: int, device: torch.device) -> Step:
    if name in ("whole batch", "chunks"):
        return model_step(None if name == "whole batch" else CHUNK, size, device)
    return loss_step(name, size, device)


def extra_memory(name: str, size: int, device: torch.device) -> float:
    """MiB that a step needs above its inputs."""
    make(name, 8, device)(0)
    step = make(name, size, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(0)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set is measured from now on
    step(0)
    return (_status("VmHWM") - before) / 2**10


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def in_a_fresh_process(name: str, size: int, args: argparse.Namespace) -> float:
    code = (
        f"import torch; torch.set_num_threads({args.threads});"
        f"from benchmarks.contrastive import extra_memory; print(extra_memory({name!r}, {size},"
        f" torch.device({str(args.device)!r})))"
    )
    return float(run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def largest_difference(mine: Gradients, theirs: Gradients) -> float:
    """Of the gradients, relative to their norm."""
    found = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    return max(float((a - b).norm() / b.norm()) for a, b in found)


def main() -> None:
    assert __doc__
    args = parse_args(__doc__.splitlines()[0], rounds=3)
    compared = [
        ("open_clip ClipLoss", "info_nce", SIZE),
        ("open_clip SigLipLoss", "sigmoid", SIZE),
        ("whole batch", "chunks", SAMPLES),
    ]
    found: list[Timings] = []
    table = Table("against", "", "extra MiB", "theirs", "memory", "gradients differ by")
    for base, name, size in compared:
        steps = {which: make(which, size, args.device) for which in (base, name)}
        different = largest_difference(steps[name](0), steps[base](0))
        found.append(interleave(f"{size} rows", base, steps, args.rounds, args.device))
        theirs, ours = (in_a_fresh_process(which, size, args) for which in (base, name))
        table.add_row(base, name, f"{ours:.0f}", f"{theirs:.0f}", f"1/{theirs / ours:.1f}", f"{different:.1e}")
    show(found, args)
    Console().print(table)


if __name__ == "__main__":
    main()
