"""Floating-point operations: those of a step, counted as it runs, and those a device can do in a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from mmformer.nn.recompute import recomputing

_MEASURED_SECONDS = 0.15


class Operations(TorchDispatchMode):
    """Adds up, in `total`, the operations of the products, convolutions and attention that run while it is entered.

    The formulas are those of torch's FLOP counter, with the attention that it leaves out on a CPU. They take the sizes
    with which a kernel is called: of a packed row the segments and not the square of the row. What activation
    checkpointing computes a second time does not count; nor does compiled FlexAttention, which is one kernel that no
    formula sees. Code that is compiled stays so, and nothing of what it computes changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", func)
        formula = _ON_CPU.get(packet) or flop_registry.get(packet)
        if formula is not None and not recomputing():
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(
    given: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(given.shape, q.shape, k.shape, v.shape)


_ON_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a plain square product, the best of those done in a sixth of a second."""
    size = 8192 if device.type == "cuda" else 1024
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=draw, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < _MEASURED_SECONDS:
        before = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best


def product_dtype(precision: str | int) -> torch.dtype:
    """The numbers that products are computed in under a Trainer's precision, such as `bf16-mixed`."""
    known = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64, "transformer": torch.bfloat16}
    return known.get(str(precision).split("-")[0], torch.float32)
