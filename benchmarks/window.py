"""Attention that looks at part of the keys against full SDPA, by length: the ground of `SPARSE_KEYS` (nn/kernels.py).

    python -m benchmarks.window
    python -m benchmarks.window --forward  # beside compiled FlexAttention, which has no backward on a CPU

Forward and backward of 4 heads of 64 channels. What a pattern looks at is found once a step, for all layers that share
it, before the clock starts: "plan" is the time of that for the window. Memory is what the highest resident set of a
fresh process exceeds that before the step (Linux).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import run

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.timing import Step, Timings, interleave, parse_args, show
from mmformer.nn import Routed
from mmformer.nn.sparse import sparse, tiles
from mmformer.patterns import BigBird, Strided, Window
from mmformer.tokens import Layout, Tokens, modality_id, segments
from mmformer.visibility import Sight, Visibility

HEADS, HEAD_DIM, REACH = 4, 64, 256
LENGTHS = (1024, 4096, 8192, 16384)
RULES = {
    "window": Visibility(window=REACH),
    "causal window": Visibility(window=REACH, causal=True),
    "dilated window": Visibility(patterns=Window(4 * REACH, dilation=4)),
    "window and global": Visibility(patterns=Window(REACH, first=1)),
    "strided blocks": Visibility(patterns=Strided(64, stride=32)),
    "BigBird": Visibility(patterns=BigBird(64)),
}
NAMES = ("full", *RULES, "routed")


def text(length: int) -> Tokens:
    """One sample, without channels."""
    layout = Layout((0,), (length,), 1)
    position = torch.zeros(1, length, 3, dtype=torch.long)
    position[0, :, 0] = torch.arange(length)
    return Tokens(
        x=torch.zeros(1, length, 0),
        modality=torch.full((1, length), modality_id("text")),
        position=position,
        segment=segments(layout, length, torch.device("cpu")),
        layout=layout,
    )


def attention(name: str, length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of (1, length, heads, channels)."""
    if name == "full":
        return lambda *qkv: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv)).transpose(1, 2)
    if name == "flex":
        return _flex(length)
    tokens = text(length)
    kernel = Routed(64, 8) if name == "routed" else sparse
    sight = Sight(RULES.get(name, Visibility()), tokens, tokens)
    return lambda q, k, v: kernel(q, k, v, sight)


def _flex(length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: (q - k).abs() <= REACH, None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda *qkv: compiled(*(t.transpose(1, 2) for t in qkv), block_mask=mask).transpose(1, 2)


def step(name: str, length: int, dtype: torch.dtype, backward: bool = True) -> Step:
    make = torch.Generator().manual_seed(0)
    shape = (1, length, HEADS, HEAD_DIM)
    inputs = [torch.randn(shape, generator=make).to(dtype).requires_grad_(backward) for _ in range(3)]
    attend = attention(name, length)

    def call(number: int) -> None:
        out = attend(*inputs)
        if backward:
            torch.autograd.grad(out.sum(), inputs)

    return call


def extra_memory(name: str, length: int) -> float:
    """MiB that a step needs above its inputs."""
    step(name, 1024, torch.float32)(0)
    call = step(name, length, torch.float32)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set is measured from now on
    call(0)
    return (_status("VmHWM") - before) / 2**10


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def in_a_fresh_process(name: str, length: int, args: argparse.Namespace) -> float:
    code = (
        f"import torch; torch.set_num_threads({args.threads});"
        f"from benchmarks.window import extra_memory; print(extra_memory({name!r}, {length}))"
    )
    return float(run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def seconds_of_plan(length: int) -> float:
    tokens = text(length)
    start = time.process_time()
    tiles(Sight(RULES["window"], tokens, tokens))
    return time.process_time() - start


def main() -> None:
    assert __doc__
    backward = "--forward" not in sys.argv
    sys.argv = [word for word in sys.argv if word != "--forward"]
    args = parse_args(__doc__.splitlines()[0], rounds=3)
    found: list[Timings] = []
    table = Table("tokens", *NAMES, "plan of the window, ms", title="extra MiB")
    for length in LENGTHS:
        for dtype in (torch.float32, torch.bfloat16) if backward else (torch.float32,):
            names = NAMES if backward else ("flex", "full", "window")
            steps = {name: step(name, length, dtype, backward) for name in names}
            title = f"{length} tokens, {str(dtype).removeprefix('torch.')}"
            found.append(interleave(title, names[0], steps, args.rounds, args.device))
        if backward:
            memory = (f"{in_a_fresh_process(name, length, args):.0f}" for name in NAMES)
            table.add_row(str(length), *memory, f"{1e3 * seconds_of_plan(length):.0f}")
    show(found, args)
    if backward:
        Console().print(table)


if __name__ == "__main__":
    main()
