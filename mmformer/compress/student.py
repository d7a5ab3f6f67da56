"""Students that start from their teacher's weights: fewer of its layers, fewer of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmformer.checkpoints import SavedModel, build
from mmformer.compress.plain import node, unrolled
from mmformer.compress.prune import Plan, prune
from mmformer.compress.sites import Layers, Site, find_sites
from mmformer.model import Model

WIDTHS = frozenset({"dim", "dim_in", "dim_out", "context_dim"})
"""Keys of a config that say how wide tokens are."""


def shallower(saved: SavedModel, depth: Mapping[str, int]) -> SavedModel:
    """A model with some layers of a trained one, evenly spaced and the last among them (DistilBERT, arXiv 1910.01108).

    `depth` names Transformers ("fusion.transformer", "encoders.image.stages.0") and how many layers of each stay.

    Raises:
        ValueError: a name that is no Transformer of several layers, or more layers than it has.
    """
    stacks = {site.paths[0]: site for site in _sites(saved) if isinstance(site, Layers)}
    for name, count in depth.items():
        if name not in stacks:
            raise ValueError(f"{name!r} is no Transformer of several layers: there are {', '.join(stacks) or 'none'}")
        if not 1 <= count <= stacks[name].count:
            raise ValueError(f"{name} has {stacks[name].count} layers, and {count} are to stay: give 1 to that many")
    sites = tuple(stacks[name] for name in depth)
    kept = tuple(_spread(site.count, depth[site.paths[0]]) for site in sites)
    layers = float(sum(site.count for site in sites))
    return prune(saved, Plan(sites, kept, max(layers, 1.0), float(sum(map(len, kept))), "layers"))


def narrower(saved: SavedModel, dim: int) -> SavedModel:
    """A model whose tokens have `dim` channels, those of a trained one with the largest weights (weight inheritance).

    As TinyCLIP starts its students (arXiv 2309.12314, section 3.2). Heads keep their channels and feed-forward maps
    their hidden ones: cut these with `prune`. Norms see other statistics then, and sinusoids of places are new, so
    unlike a pruned model this one has to be trained before it is good.

    Raises:
        ValueError: tokens of several widths, of no more channels than that, or a tensor whose axes say nothing of it.
    """
    config = unrolled(saved.config["model"])
    widths = set(_widths(config))
    if len(widths) != 1 or not 0 < dim < max(widths):
        raise ValueError(
            f"the tokens of this model have {sorted(widths)} channels: {dim} must be below one width of all"
        )
    (wide,) = widths
    for site in _sites(saved):
        if not isinstance(site, Layers):
            for path in site.paths:
                found = node(config, path, saved.model.get_submodule(path))
                assert found is not None
                site.write(found, range(site.count))
    config = _with_width(config, wide, dim)
    with torch.random.fork_rng(devices=[]):
        model = build(config, trust=True)
    _inherit(model, saved.model, wide, dim)
    compressed = {"dim": [dim, wide]}
    return replace(saved, model=model.eval(), config={**saved.config, "model": config, "compressed": compressed})


def _sites(saved: SavedModel) -> list[Site]:
    return list(find_sites(saved.model, unrolled(saved.config["model"])))


def _spread(count: int, kept: int) -> tuple[int, ...]:
    """`kept` of `count` places, evenly spaced, the last among them and the first where there are two."""
    if kept == 1:
        return (count - 1,)
    return tuple(round(i * (count - 1) / (kept - 1)) for i in range(kept))


def _widths(config: Any) -> list[int]:
    if isinstance(config, list):
        return [width for value in config for width in _widths(value)]
    if not isinstance(config, dict):
        return []
    own = [value for key, value in config.items() if key in WIDTHS and isinstance(value, int)]
    return own + [width for value in config.values() for width in _widths(value)]


def _with_width(config: Any, wide: int, dim: int) -> Any:
    if isinstance(config, list):
        return [_with_width(value, wide, dim) for value in config]
    if not isinstance(config, dict):
        return config
    return {
        key: dim if key in WIDTHS and value == wide else _with_width(value, wide, dim) for key, value in config.items()
    }


def _inherit(student: Model, teacher: Model, wide: int, dim: int) -> None:
    """Copy the channels of the residual stream that have the largest weights, the same ones in every tensor."""
    pairs = dict(teacher.named_parameters())
    energy = torch.zeros(wide)
    for name, mine in student.named_parameters():
        for axis in _axes(name, pairs[name], mine, wide, dim):
            theirs = pairs[name].detach().float().movedim(axis, -1).unflatten(-1, (-1, wide))
            share = theirs.square().flatten(0, -2).sum(0)
            energy += share / share.sum().clamp(min=1e-12)
    kept = energy.topk(dim).indices.sort().values
    with torch.no_grad():
        for name, mine in student.named_parameters():
            mine.copy_(_chosen(pairs[name], _axes(name, pairs[name], mine, wide, dim), kept, wide))
        buffers = dict(teacher.named_buffers())
        for name, mine in student.named_buffers():
            if mine.shape == buffers[name].shape:
                mine.copy_(buffers[name])


def _axes(name: str, theirs: Tensor, mine: Tensor, wide: int, dim: int) -> list[int]:
    """The axes of a tensor that are channels of tokens, once or several times over."""
    axes = [axis for axis, (a, b) in enumerate(zip(theirs.shape, mine.shape, strict=True)) if a != b]
    if any(theirs.shape[axis] * dim != mine.shape[axis] * wide or theirs.shape[axis] % wide for axis in axes):
        raise ValueError(
            f"{name} is {tuple(theirs.shape)}, and {tuple(mine.shape)} with {dim} channels in the place of {wide}: "
            "which of its numbers belong to which channel cannot be told"
        )
    return axes


def _chosen(tensor: Tensor, axes: list[int], kept: Int[Tensor, " dim"], wide: int) -> Float[Tensor, ...]:
    for axis in axes:
        blocks = torch.arange(tensor.shape[axis] // wide)[:, None] * wide + kept
        tensor = tensor.index_select(axis, blocks.flatten())
    return tensor
