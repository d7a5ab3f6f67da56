"""An optimizer whose state lies in the memory of the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Offloaded(Optimizer):
    """Keeps weights and state on the CPU and updates them there; the device has weights and gradients alone.

    `make` makes the optimizer that computes, from groups of parameters on the CPU. Gradients are read when a step is
    taken, as clipping and the guard have left them, so all of a step works as without. (torchao's optimizer of this
    kind reads them in the backward pass, and would take them unclipped.) A checkpoint is that of the optimizer within.
    """

    def __init__(self, groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], Optimizer]) -> None:
        super().__init__(groups, {})
        hosts = [group | {"params": [_host(p) for p in group["params"]]} for group in self.param_groups]
        self.inner = make(hosts)
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._give_settings()
        pairs = list(self._pairs())
        for parameter, host in pairs:
            host.grad = None if parameter.grad is None else _copy(parameter.grad, host.grad)
        _wait(pairs)
        self.inner.step()
        for parameter, host in pairs:
            if host.grad is not None:
                parameter.copy_(host, non_blocking=True)
        _wait(pairs)  # the next step writes to what is copied from
        return loss

    def _pairs(self) -> Any:
        """Each parameter with its copy on the host."""
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            yield from zip(group["params"], own["params"], strict=True)

    def _give_settings(self) -> None:
        """Learning rates and the like, which schedules set."""
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            own.update({name: value for name, value in group.items() if name != "params"})

    def state_dict(self) -> dict[str, Any]:
        self._give_settings()
        return self.inner.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state over, and the weights as the device has them by now."""
        self.inner.load_state_dict(state_dict)
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
        for parameter, host in self._pairs():
            host.copy_(parameter)


def _host(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(_empty_like(parameter).copy_(parameter.detach()))


def _empty_like(tensor: Tensor) -> Tensor:
    """Memory of the host, which a GPU can copy to and from while other work goes on."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda", requires_grad=False)


def _copy(gradient: Tensor, place: Tensor | None) -> Tensor:
    place = _empty_like(gradient) if place is None else place
    return place.copy_(gradient, non_blocking=True)


def _wait(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    for device in {parameter.device for parameter, _ in pairs if parameter.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
