"""Optimizers, learning-rate schedules and the average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters, decayed and not: norms, biases, single vectors, positions and latents are not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    seen: set[nn.Parameter] = set()
    for owner_name, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                groups[_decays(f"{owner_name}.{name}", parameter)].append(parameter)
    decayed = {"params": groups[True], "weight_decay": weight_decay}
    return [group for group in (decayed, {"params": groups[False], "weight_decay": 0.0}) if group["params"]]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.squeeze().ndim > 1 and not any(word in name for word in ("position", "latent"))


def adamw(module: nn.Module, *, lr: float, weight_decay: float, betas: Sequence[float]) -> AdamW:
    """Fused AdamW over `parameter_groups`."""
    groups = parameter_groups(module, weight_decay)
    if not groups:
        raise ValueError("no parameter requires a gradient: everything is frozen, so there is nothing to train")
    first, second = betas
    return AdamW(groups, lr=lr, betas=(first, second), fused=True)


def warmup_cosine(optimizer: Optimizer, total_steps: int, *, warmup: float, floor: float) -> LambdaLR:
    """Linear warm-up, then half a cosine down to `floor` times the learning rate, by optimizer step.

    `warmup` below 1 is a fraction of `total_steps`, from 1 on a number of steps.
    """
    rise = round(warmup * total_steps) if warmup < 1 else round(warmup)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, total_steps - rise))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def total_steps(max_steps: int, max_epochs: int | None, steps_per_epoch: int) -> int:
    """The number of optimizer steps of a run: what comes first, `max_steps` or `max_epochs`; -1 means no limit.

    A schedule by wall-clock time would make the weights depend on the machine's load, so there is none:
    `trainer.max_time` stops a run wherever the schedule then is.

    Raises:
        ValueError: neither limit is set, so that the schedule has no end.
    """
    limits = [max_steps] if max_steps >= 0 else []
    if max_epochs is not None and max_epochs >= 0:
        limits.append(max_epochs * steps_per_epoch)
    if not limits:
        raise ValueError("the learning-rate schedule has no end: set trainer.max_steps or trainer.max_epochs")
    return min(limits)


class Average(nn.Module):
    """An exponential moving average of a module's weights; other state (buffers) is copied."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"ema is {decay}: the decay must lie between 0 and 1, such as 0.999")
        self.decay = decay
        self.module = deepcopy(module).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Average:
        """An average is never trained: it stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step`, from 1 on; early steps count more: it starts warm."""
        decay = min(self.decay, step / (step + 9.0))
        mine, theirs = list(self.module.parameters()), list(module.parameters())
        torch._foreach_lerp_(_data(mine), _data(theirs), 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for ours, new in zip(self.module.buffers(), module.buffers(), strict=True):
            ours.copy_(new)


def _data(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach() for parameter in parameters]
