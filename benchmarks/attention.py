"""Attention on a CPU by SDPA against matmul, softmax, matmul, by length: the ground of `PLAIN_KEYS` (nn/kernels.py).

    python -m benchmarks.attention

Forward and backward of 4 heads of 64 channels over 4,096 tokens, cut into segments of equal length, as a packed row
serves them: short ones share a call, long ones, hardly ever of one length, come alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Step, Timings, interleave, parse_args, show

TOKENS, HEADS, HEAD_DIM = 4096, 4, 64
SHARED = 128  # tokens: up to this length segments share a call
LENGTHS = (16, 64, 128, 256, 384, 512, 768, 1024)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v


def step(attention: Callable[[Tensor, Tensor, Tensor], Tensor], length: int, dtype: torch.dtype) -> Step:
    """Forward and backward."""
    make = torch.Generator().manual_seed(0)
    calls = 1 if length <= SHARED else TOKENS // length
    shape = (TOKENS // length // calls, HEADS, length, HEAD_DIM)
    inputs = [torch.randn(shape, generator=make).to(dtype).requires_grad_() for _ in range(3)]

    def run(number: int) -> None:
        for _ in range(calls):
            torch.autograd.grad(attention(*inputs).sum(), inputs)

    return run


def main() -> None:
    assert __doc__
    args = parse_args(__doc__.splitlines()[0], rounds=5)
    found: list[Timings] = []
    for dtype in (torch.float32, torch.bfloat16):
        for length in LENGTHS:
            steps = {"SDPA": step(sdpa, length, dtype), "matmul": step(matmul, length, dtype)}
            title = f"{str(dtype).removeprefix('torch.')}, {length} keys"
            found.append(interleave(title, "SDPA", steps, args.rounds, args.device))
    show(found, args)


if __name__ == "__main__":
    main()
