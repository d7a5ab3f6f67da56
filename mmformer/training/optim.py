"""Optimizers, learning-rate schedules and the average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmformer.training.layer_decay import distances
from mmformer.training.offload import Offloaded


def parameter_groups(module: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters by learning rate and decay: norms, biases, vectors, positions and latents do not decay.

    `layer_decay` multiplies the rate once for each layer above a parameter (`distances`); heads have all of it.
    """
    depth = distances(module) if layer_decay != 1 else {}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for owner_name, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                key = (depth.get(parameter, 0), not _decays(f"{owner_name}.{name}", parameter))
                groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "lr": lr * layer_decay**level, "weight_decay": 0.0 if bare else weight_decay}
        for (level, bare), params in sorted(groups.items(), key=lambda group: group[0])
    ]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.squeeze().ndim > 1 and not any(word in name for word in ("position", "latent"))


def adamw(module: nn.Module, *, lr: float, weight_decay: float, betas: Sequence[float], layer_decay: float) -> AdamW:
    """Fused AdamW over `parameter_groups`."""
    groups = _groups(module, lr, weight_decay, layer_decay)
    first, second = betas
    return AdamW(groups, lr=lr, betas=(first, second), fused=True)


def offloaded_adamw(
    module: nn.Module, *, lr: float, weight_decay: float, betas: Sequence[float], layer_decay: float
) -> Optimizer:
    """AdamW whose weights and moments lie in the host's memory and are updated there (`Offloaded`).

    A GPU then holds 8 bytes less for each parameter, and a step waits for its gradients to be copied.

    Raises:
        ValueError: the module is on the CPU already.
    """
    groups = _groups(module, lr, weight_decay, layer_decay)
    if all(p.device.type == "cpu" for group in groups for p in group["params"]):
        raise ValueError(
            "optimizer@module.optimizer=adamw_offloaded keeps moments off a GPU, and this model is on the CPU, where"
            " they lie anyway: take optimizer@module.optimizer=adamw, or trainer=gpu"
        )
    first, second = betas
    return Offloaded(groups, partial(AdamW, lr=lr, betas=(first, second), fused=True))


def adamw_8bit(
    module: nn.Module, *, lr: float, weight_decay: float, betas: Sequence[float], layer_decay: float
) -> Optimizer:
    """AdamW with moments of 8 bits in blocks of 256 (arXiv 2110.02861), a quarter of the memory; torchao's.

    Tensors below 4096 numbers keep moments of 32 bits. Its step is compiled, so it needs a compiler: on a CPU that
    of C++, and there it is many times slower than `adamw`.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    groups = _groups(module, lr, weight_decay, layer_decay)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ModuleNotFoundError(
            "optimizer@module.optimizer=adamw_8bit needs torchao: pip install 'mmformer[mobile]'"
        ) from error
    first, second = betas
    optimizer = AdamW8bit(groups, lr=lr, betas=(first, second))
    optimizer.register_state_dict_post_hook(_state_to_plain)
    optimizer.register_load_state_dict_pre_hook(_state_from_plain)
    return optimizer


def _groups(module: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    groups = parameter_groups(module, lr, weight_decay, layer_decay)
    if not groups:
        raise ValueError("no parameter requires a gradient: everything is frozen, so there is nothing to train")
    return groups


def _state_to_plain(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Moments of 8 bits as plain tensors: a checkpoint is read before torchao is there, and names none of its types."""
    from torchao.optim.subclass_8bit import OptimState8bit

    def plain(value: Any) -> Any:
        if not isinstance(value, OptimState8bit):
            return value
        return {"codes": value.codes, "scale": value.scale, "qmap": value.qmap, "signed": value.signed}

    state = {key: {k: plain(v) for k, v in own.items()} for key, own in state_dict["state"].items()}
    return state_dict | {"state": state}


def _state_from_plain(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    from torchao.optim.subclass_8bit import OptimState8bit

    def moment(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return OptimState8bit(value["codes"], value["scale"], value["qmap"], value["signed"], torch.float32)

    state = {key: {k: moment(v) for k, v in own.items()} for key, own in state_dict["state"].items()}
    return state_dict | {"state": state}


def describe_groups(optimizer: Optimizer, module: nn.Module) -> str:
    """A table of an optimizer's groups: learning rate at its highest, weight decay, parameters, and of which parts."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    lines = ["   lr        decay  parameters  parts"]
    for group in optimizer.param_groups:
        parts = list(dict.fromkeys(_part(names[p]) for p in group["params"]))
        shown = ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")
        size = sum(p.numel() for p in group["params"])
        rate = group.get("initial_lr", group["lr"])
        lines.append(f"   {rate:<9.3g} {group['weight_decay']:<6g} {size:>10,}  {shown}")
    return "\n".join(lines)


def _part(name: str) -> str:
    """What a parameter belongs to: a layer, where it lies in one, or a part of the model."""
    words = name.removeprefix("model.").split(".")
    numbers = [i for i, word in enumerate(words) if word.isdecimal() and words[i - 1] != "stages"]
    layers = numbers if "embedder" not in words else []
    return ".".join(words[: layers[0] + 1] if layers else words[: min(3, max(2, len(words) - 1))])


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
    """An exponential moving average of a module's weights; other state (buffers) is copied.

    A parameter that is frozen when the average is made is not copied but shared.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"ema is {decay}: the decay must lie between 0 and 1, such as 0.999")
        self.decay = decay
        frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
        self.module = deepcopy(module, frozen).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Average:
        """An average is never trained: it stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step`, from 1 on; early steps count more: it starts warm."""
        decay = min(self.decay, step / (step + 9.0))
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        moving = [(ours, new) for ours, new in pairs if ours is not new]
        if moving:
            mine, theirs = zip(*moving, strict=True)
            torch._foreach_lerp_(_data(mine), _data(theirs), 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for ours, new in zip(self.module.buffers(), module.buffers(), strict=True):
            ours.copy_(new)


def _data(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach() for parameter in parameters]
