"""What a model costs, and what each unit of it would save: in parameters, in operations, in measured time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from mmformer.batch import Batch
from mmformer.compress.sites import Channels, Heads, Layers, Site, inside, named_layers
from mmformer.model import Model

Calls = list[tuple]
"""What a part is called with, each time in one pass."""
WIDTHS = (0.25, 0.5, 0.75, 1.0)
"""Shares of a site's units at which its time is measured; between them it is a straight line."""


@dataclass(frozen=True)
class Prices:
    """The cost of a model, of each site with any number of units kept, and of what else a layer has.

    `curves[s][n]` is site s with n units, `rest[s][i]` layer i of a `Layers` site without the sites inside it.
    """

    total: float
    curves: Sequence[Float[np.ndarray, " _"]]
    rest: dict[int, Float[np.ndarray, " _"]]
    unit: str


@runtime_checkable
class Cost(Protocol):
    """Asks a model what it costs, on a batch of real samples."""

    def __call__(self, model: Model, sites: Sequence[Site], batch: Batch) -> Prices: ...


@dataclass(frozen=True)
class Parameters:
    """The number of weights."""

    def __call__(self, model: Model, sites: Sequence[Site], batch: Batch) -> Prices:
        curves: list[np.ndarray] = []
        for site in sites:
            whole = _size(model.get_submodule(site.paths[0]))
            least = _size(_cut(model, site, range(1)))
            unit = 0.0 if isinstance(site, Layers) else (whole - least) / max(1, site.count - 1)
            curves.append(whole - unit * (site.count - np.arange(site.count + 1)))
        total = float(sum(p.numel() for p in model.parameters()))
        return Prices(total, curves, _rest(model, sites, curves, lambda _, layer: _size(layer)), "parameters")


@dataclass(frozen=True)
class Operations:
    """Multiplications and additions of one pass over the batch, each counted (a product of matrices is 2 n m k)."""

    def __call__(self, model: Model, sites: Sequence[Site], batch: Batch) -> Prices:
        counter, passed = _counter(), {}
        handles: list[RemovableHandle] = []
        for name, part in _parts(model, sites).items():
            handles.append(part.register_forward_pre_hook(partial(_meter, counter, passed, name, -1)))
            handles.append(part.register_forward_hook(partial(_meter, counter, passed, name, 1)))
        try:
            with counter:
                run_all(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        curves = [passed.get(site.paths[0], 0.0) * np.arange(site.count + 1) / site.count for site in sites]
        rest = _rest(model, sites, curves, lambda name, _: passed.get(name, 0.0))
        return Prices(float(counter.get_total_flops()), curves, rest, "operations")


@dataclass(frozen=True)
class Latency:
    """Seconds of processor time on one thread, from a table of what each site takes at several widths.

    Each is the least of `rounds` measurements; the model's own pass is `total`.
    """

    rounds: int = 7

    def __call__(self, model: Model, sites: Sequence[Site], batch: Batch) -> Prices:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            given = _inputs(model, sites, batch)
            (total,) = _interleaved([lambda: run_all(model, batch)], self.rounds)
            curves = [self._curve(model, site, given) for site in sites]
            rest = _rest(model, sites, curves, lambda name, layer: self._times([layer], given.get(name, []))[0])
        finally:
            torch.set_num_threads(threads)
        return Prices(total, curves, rest, "seconds")

    def _curve(self, model: Model, site: Site, given: Mapping[str, Calls]) -> Float[np.ndarray, " _"]:
        if isinstance(site, Layers):
            return np.zeros(site.count + 1)
        counts = sorted({max(1, round(site.count * share)) for share in WIDTHS})
        seconds = self._times([_cut(model, site, range(count)) for count in counts], given.get(site.paths[0], []))
        return np.interp(np.arange(site.count + 1), [0, *counts], [0.0, *seconds])

    def _times(self, parts: Sequence[nn.Module], calls: Calls) -> list[float]:
        with torch.inference_mode():
            return _interleaved([lambda part=part: [part(*inputs) for inputs in calls] for part in parts], self.rounds)


@torch.no_grad()
def run_all(model: Model, batch: Batch) -> None:
    """One pass: every encoder, the fusion and every head that reads what it makes."""
    encoded = model.encode(batch)
    if model.fusion is not None:
        model.fuse(encoded)


def operations(model: Model, batch: Batch) -> int:
    """Operations of one pass over a batch, counted while it runs; elementwise ones are left out."""
    counter = _counter()
    with counter:
        run_all(model, batch)
    return counter.get_total_flops()


def _counter() -> FlopCounterMode:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={fused: _attention_operations})


def _attention_operations(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of attention in one kernel, from the shapes (n, heads, tokens, channels); torch counts it only on a GPU."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _meter(counter: FlopCounterMode, passed: dict[str, float], name: str, sign: int, *_: Any) -> None:
    """Adds what has been counted by now, or takes it away when a part begins."""
    passed[name] = passed.get(name, 0.0) + sign * counter.get_total_flops()


def _parts(model: Model, sites: Sequence[Site]) -> dict[str, nn.Module]:
    """Sites that are no stacks, and the layers of those that are, by name."""
    parts: dict[str, nn.Module] = {}
    for site in sites:
        if isinstance(site, Layers):
            parts |= named_layers(model, site)
        else:
            parts[site.paths[0]] = model.get_submodule(site.paths[0])
    return parts


def _cut(model: Model, site: Site, kept: Sequence[int]) -> nn.Module:
    """A copy of the part of a site with some of its units."""
    if isinstance(site, Layers):
        return nn.ModuleList()
    part = deepcopy(model.get_submodule(site.paths[0]))
    holder = nn.Module()
    holder.add_module("part", part)
    assert isinstance(site, Heads | Channels)
    alone = type(site)(("part",), *[getattr(site, name) for name in list(site.__dataclass_fields__)[1:]])
    alone.cut(holder, list(kept))
    return part.eval()


def _rest(
    model: Model, sites: Sequence[Site], curves: Sequence[np.ndarray], cost: Callable[[str, nn.Module], float]
) -> dict[int, Float[np.ndarray, " _"]]:
    """What each layer has beside the sites in it; `cost` is asked for the whole of a layer, by its name."""
    found = {}
    for i, site in enumerate(sites):
        if isinstance(site, Layers):
            layers = named_layers(model, site)
            own = [
                sum(curve[-1] for other, curve in zip(sites, curves, strict=True) if inside(other, site, place))
                for place in range(site.count)
            ]
            found[i] = np.array([cost(*layer) for layer in layers.items()]) - np.array(own)
    return found


def _size(module: nn.Module) -> float:
    return float(sum(p.numel() for p in module.parameters()))


def _inputs(model: Model, sites: Sequence[Site], batch: Batch) -> dict[str, Calls]:
    """What each site and each layer is called with in one pass."""
    given: dict[str, Calls] = {}
    handles = [
        part.register_forward_pre_hook(partial(_note, given.setdefault(name, [])))
        for name, part in _parts(model, sites).items()
    ]
    try:
        with torch.inference_mode():
            run_all(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return given


def _note(calls: Calls, module: nn.Module, inputs: tuple) -> None:
    calls.append(inputs)


def _interleaved(steps: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The least processor time of each step, taking turns; one call each to warm up."""
    for step in steps:
        step()
    best = [float("inf")] * len(steps)
    for _ in range(rounds):
        for i, step in enumerate(steps):
            start = time.process_time()
            step()
            best[i] = min(best[i], time.process_time() - start)
    return best
