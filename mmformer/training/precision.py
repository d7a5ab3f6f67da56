"""Which arithmetic a device can do, found out rather than assumed."""

from __future__ import annotations

import torch

_FP32_ACCURATE = 1e-6
"""Relative error (Frobenius) below which a product counts as computed in 32 bits; bf16 gives about 3e-3."""


def check_precision(precision: str | int, accelerator: str) -> None:
    """Refuse 16-bit floats where they are known to fail.

    Raises:
        ValueError: a `16-*` precision on a CPU.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    if on_cpu and str(precision).startswith("16"):
        raise ValueError(
            f"trainer.precision={precision} on a CPU: `16-true` trains to NaN without an error there and `16-mixed` is"
            " bf16 under another name; use trainer.precision=bf16-mixed or 32-true"
        )


def matmul_error(device: torch.device) -> float:
    """Relative error of a float32 matrix product on this machine, against float64."""
    make = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=make, dtype=torch.float64) for _ in range(2))
    exact = a.float().double() @ b.float().double()
    found = (a.float().to(device) @ b.float().to(device)).cpu().double()
    return float((found - exact).norm() / exact.norm())


def fast_matmul(device: torch.device) -> bool:
    """Let float32 products use the faster library where that costs no accuracy; returns whether it is in use.

    On some CPUs the setting "medium" takes another library, up to twice as fast and as exact; elsewhere it computes in
    bf16. So the error is measured, and the setting taken back unless it stays below 1e-6.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if matmul_error(device) <= _FP32_ACCURATE:
        return True
    torch.set_float32_matmul_precision(before)
    return False
