"""Where a model can be cut so that its tensors shrink: heads, channels of feed-forward maps, whole layers.

Each site knows three things about its units: how to weigh what each contributes by a gate (a gate of zeros is the
model without them), how to take them out of the module, and how the config says it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmformer.compress.plain import node
from mmformer.model import Model
from mmformer.nn import Attention, CrossAttention, FeedForward, NormedRotary, Rotary, Transformer
from mmformer.tokens import Tokens


@runtime_checkable
class Site(Protocol):
    """A place with `count` units, all alike in cost but those of `Layers`, of which at least `least` stay.

    `paths` are its names in the model: several where a part is shared. Units go in blocks of `step`.
    """

    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def count(self) -> int: ...
    @property
    def least(self) -> int: ...
    @property
    def step(self) -> int: ...

    def gate(self, model: nn.Module, gate: Float[Tensor, " count"]) -> list[RemovableHandle]:
        """Multiply what each unit contributes by a number, until the handles are removed."""
        ...

    def weigh(self, model: nn.Module) -> Float[Tensor, " count"]:
        """How large the weights of each unit are."""
        ...

    def cut(self, model: nn.Module, kept: Sequence[int]) -> None:
        """Take all other units out of the module."""
        ...

    def write(self, config: dict[str, Any], kept: Sequence[int]) -> None:
        """Say so in its node of the config."""
        ...


@dataclass(frozen=True)
class Heads:
    """The heads of one attention; those that share keys and values are one unit."""

    paths: tuple[str, ...]
    count: int
    each: int
    """Heads of one unit."""
    dims: tuple[int, int]
    """Channels of a head, of queries and keys and of values."""
    least: int = 1
    step: int = 1

    def gate(self, model: nn.Module, gate: Float[Tensor, " count"]) -> list[RemovableHandle]:
        wide = gate.repeat_interleave(self.each * self.dims[1])
        return [_part(model, self).out.register_forward_pre_hook(lambda _, inputs: (inputs[0] * wide,))]

    def reading(self, model: nn.Module) -> nn.Linear:
        """The map that reads what the units gave."""
        return _part(model, self).out

    def by_unit(self, values: Float[Tensor, " channels"]) -> Float[Tensor, "count _"]:
        """Numbers of the channels that `reading` reads, a row for each unit."""
        return values.view(self.count, -1)

    def weigh(self, model: nn.Module) -> Float[Tensor, " count"]:
        return self.by_unit(self.reading(model).weight.detach().square().sum(0)).sum(1).sqrt()

    def cut(self, model: nn.Module, kept: Sequence[int]) -> None:
        part = _part(model, self)
        heads = [unit * self.each + i for unit in kept for i in range(self.each)]
        q, k = _channels(heads, self.dims[0]), _channels(kept, self.dims[0])
        v, out = _channels(kept, self.dims[1]), _channels(heads, self.dims[1])
        wide, narrow = self.count * self.each * self.dims[0], self.count * self.dims[0]
        if isinstance(part, Attention):
            part.qkv = _rows(part.qkv, [*q, *(wide + c for c in k), *(wide + narrow + c for c in v)])
        else:
            part.query = _rows(part.query, q)
            part.key_value = _rows(part.key_value, [*k, *(narrow + c for c in v)])
        part.out = _columns(part.out, out)
        part.heads, part.groups = len(heads), len(kept)

    def write(self, config: dict[str, Any], kept: Sequence[int]) -> None:
        config["num_heads"] = len(kept) * self.each
        if self.each > 1:
            config["num_kv_heads"] = len(kept)
        config["head_dim"] = self.dims[0] if self.dims[0] == self.dims[1] else list(self.dims)


@dataclass(frozen=True)
class Channels:
    """The hidden channels of one feed-forward map."""

    paths: tuple[str, ...]
    count: int
    gated: bool
    least: int = 8
    step: int = 8

    def gate(self, model: nn.Module, gate: Float[Tensor, " count"]) -> list[RemovableHandle]:
        return [self.reading(model).register_forward_pre_hook(lambda _, inputs: (inputs[0] * gate,))]

    def reading(self, model: nn.Module) -> nn.Linear:
        """The map that reads what the units gave."""
        return _part(model, self).down

    def by_unit(self, values: Float[Tensor, " channels"]) -> Float[Tensor, "count 1"]:
        """Numbers of the channels that `reading` reads, a row for each unit."""
        return values[:, None]

    def weigh(self, model: nn.Module) -> Float[Tensor, " count"]:
        part = _part(model, self)
        into = part.up.weight.detach().square().sum(1).view(-1, self.count).sum(0)
        return (into * part.down.weight.detach().square().sum(0)).sqrt()

    def cut(self, model: nn.Module, kept: Sequence[int]) -> None:
        part = _part(model, self)
        part.up = _rows(part.up, [*kept, *(self.count + c for c in kept if self.gated)])
        part.down = _columns(part.down, list(kept))

    def write(self, config: dict[str, Any], kept: Sequence[int]) -> None:
        config.pop("expansion", None)
        config["hidden"] = len(kept)


@dataclass(frozen=True)
class Layers:
    """The layers of one Transformer; without one, its tokens stay as they were."""

    paths: tuple[str, ...]
    count: int
    least: int = 1
    step: int = 1

    def gate(self, model: nn.Module, gate: Float[Tensor, " count"]) -> list[RemovableHandle]:
        def weigh(place: int, inputs: tuple, output: Tokens) -> Tokens:
            return output.with_x(torch.lerp(inputs[0].x, output.x, gate[place]))

        return [
            layer.register_forward_hook(lambda _, inputs, output, place=place: weigh(place, inputs, output))
            for place, layer in enumerate(_part(model, self).layers)
        ]

    def weigh(self, model: nn.Module) -> Float[Tensor, " count"]:
        layers = _part(model, self).layers
        return torch.stack(
            [torch.stack([p.detach().square().sum() for p in layer.parameters()]).sum().sqrt() for layer in layers]
        )

    def cut(self, model: nn.Module, kept: Sequence[int]) -> None:
        part = _part(model, self)
        part.layers = nn.ModuleList(part.layers[i] for i in kept)

    def write(self, config: dict[str, Any], kept: Sequence[int]) -> None:
        config["layers"] = [config["layers"][i] for i in kept]
        config["depth"] = len(kept)


def find_sites(model: Model, config: dict[str, Any]) -> Iterator[Site]:
    """All places where a model can be cut and its config can say so; `config` is unrolled.

    Left whole are attention of other kinds, or with parameters for each head beside the usual maps; feed-forward maps
    with a norm between, whose statistics a cut would change; and stacks of layers that a model shares by their numbers.
    """
    places: dict[nn.Module, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        places[module].append(path)
    for module, paths in places.items():
        site = _site(module, tuple(paths))
        if isinstance(site, Layers) and config.get("shared"):
            continue
        if site is not None and all(node(config, path, module) is not None for path in paths):
            yield site


def _site(module: nn.Module, paths: tuple[str, ...]) -> Site | None:
    if type(module) in (Attention, CrossAttention):
        assert isinstance(module, Attention | CrossAttention)
        plain_rotary = getattr(module, "rotary", None) is None or isinstance(module.rotary, Rotary | NormedRotary)
        if isinstance(module.kernel, nn.Module) or not plain_rotary:
            return None
        each = module.heads // module.groups
        return Heads(paths, module.groups, each, (module.head_dim, module.value_dim))
    if type(module) is FeedForward:
        assert isinstance(module, FeedForward)
        hidden = module.down.in_features
        whole = isinstance(module.inner_norm, nn.Identity)
        return Channels(paths, hidden, module.gated, min(8, hidden)) if whole else None
    if type(module) is Transformer and isinstance(module, Transformer) and len(module.layers) > 1:
        return Layers(paths, len(module.layers))
    return None


def named_layers(model: nn.Module, site: Layers) -> dict[str, nn.Module]:
    """The layers of a Transformer by name."""
    stack = site.paths[0]
    return {f"{stack}.layers.{i}": model.get_submodule(f"{stack}.layers.{i}") for i in range(site.count)}


def inside(site: Site, layers: Layers, place: int) -> bool:
    """Whether a site belongs to one layer of a Transformer."""
    return any(path.startswith(f"{stack}.layers.{place}.") for path in site.paths for stack in layers.paths)


def _part(model: nn.Module, site: Any) -> Any:
    return model.get_submodule(site.paths[0])


def _channels(units: Sequence[int], size: int) -> list[int]:
    return [unit * size + i for unit in units for i in range(size)]


def _rows(linear: nn.Linear, kept: Sequence[int]) -> nn.Linear:
    """A linear map with some of its outputs."""
    bias = None if linear.bias is None else linear.bias.detach()[list(kept)]
    return _linear(linear.weight.detach()[list(kept)], bias)


def _columns(linear: nn.Linear, kept: Sequence[int]) -> nn.Linear:
    """A linear map with some of its inputs."""
    return _linear(linear.weight.detach()[:, list(kept)], None if linear.bias is None else linear.bias.detach())


def _linear(weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    return made
