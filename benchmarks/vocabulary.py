"""The loss over a long vocabulary with its scores part by part, against all of them at once: time and memory.

    uv run python -m benchmarks.vocabulary

Forward and backward of a linear map and the cross-entropy behind it, with gradients for both sides of the map. Memory
is what a step adds to weights, inputs and their gradients, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Step, Timings, interleave, parser, peak_mb, prepare, show
from mmformer.losses.language import linear_token_loss

WIDTH = 384
CASES = ((256, 8_192), (2_048, 8_192), (512, 50_257), (1_024, 50_257))


def whole(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), ids, reduction="sum")


def in_parts(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return linear_token_loss(x, weight, None, ids)


def step(loss: Callable[..., Tensor], given: list[Tensor], ids: Tensor, dtype: torch.dtype) -> Step:
    def run(number: int) -> float:
        for leaf in given:
            leaf.grad = None
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            value = loss(*given, ids) / len(ids)
        value.backward()
        return value.item()

    return run


def measure(rows: int, words: int, dtype: torch.dtype, args: Any) -> Timings:
    draw = torch.Generator().manual_seed(0)
    shapes = ((rows, WIDTH), (words, WIDTH))
    given = [(torch.randn(s, generator=draw) * 0.1).to(args.device).requires_grad_() for s in shapes]
    ids = torch.randint(0, words, (rows,), generator=draw).to(args.device)
    steps = {name: step(loss, given, ids, dtype) for name, loss in (("all scores", whole), ("in parts", in_parts))}
    title = f"{rows} x {words}, {str(dtype).removeprefix('torch.')}"
    memory = {name: peak_mb(run, args.device) for name, run in steps.items()}
    values = [run(0) for run in steps.values()]
    print(title, *(f"{name}: {mb:.0f} MB" for name, mb in memory.items()), f"losses {values}", sep="  ", flush=True)
    return interleave(title, "all scores", steps, args.rounds, args.device)


def main() -> None:
    args = prepare(parser(__doc__ or "", rounds=5).parse_args())
    show([measure(*case, dtype, args) for dtype in (torch.float32, torch.bfloat16) for case in CASES], args)


if __name__ == "__main__":
    main()
