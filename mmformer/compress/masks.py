"""Zeros in weights whose tensors keep their shapes: smaller when packed, and no faster on anything measured here.

A CPU multiplies zeros like other numbers, so these masks are for what reads them elsewhere: 2:4 for the sparse tensor
cores of a GPU, unstructured ones for a file that is compressed. What is faster is `mmformer.compress.prune`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.checkpoints import SavedModel
from mmformer.compress.costs import run_all
from mmformer.model import Model

Masks = Mapping[str, Bool[Tensor, "_ _"]]


def importance(model: Model, batches: Sequence[Batch] = ()) -> dict[str, Float[Tensor, "_ _"]]:
    """Of each weight of the linear maps of encoders and fusion, its size; with samples, times the norm of its input.

    The latter is Wanda (arXiv 2306.11695, equation 1). Heads are left whole.
    """
    maps = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and not name.startswith("heads.")
    }
    norms = {name: torch.zeros(part.in_features) for name, part in maps.items()}

    handles = [part.register_forward_pre_hook(_adder(norms[name])) for name, part in maps.items()]
    try:
        for batch in batches:
            run_all(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    sizes = {name: part.weight.detach().abs().cpu() for name, part in maps.items()}
    return {name: size * norms[name].sqrt() for name, size in sizes.items()} if batches else sizes


def _adder(total: Float[Tensor, " i"]) -> Callable[[nn.Module, tuple], None]:
    def see(part: nn.Module, inputs: tuple) -> None:
        total.add_(inputs[0].detach().flatten(0, -2).float().square().sum(0).cpu())

    return see


def unstructured(scores: Mapping[str, Float[Tensor, "_ _"]], share: float) -> Masks:
    """Keep all but a `share` of each row's weights, those of the least importance.

    Raises:
        ValueError: a share outside 0 to 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share}: give the share of weights that become 0, between 0 and 1")
    masks = {}
    for name, score in scores.items():
        gone = score.argsort(dim=1, stable=True)[:, : round(share * score.shape[1])]
        masks[name] = torch.ones_like(score, dtype=torch.bool).scatter(1, gone, False)
    return masks


def two_of_four(scores: Mapping[str, Float[Tensor, "_ _"]]) -> Masks:
    """Of every four weights in a row the two of the highest importance: what a GPU's sparse cores take.

    Maps whose inputs do not divide by four are left whole.
    """
    masks = {}
    for name, score in scores.items():
        if score.shape[1] % 4 == 0:
            fours = score.unflatten(1, (-1, 4))
            best = fours.topk(2, -1).indices
            masks[name] = torch.zeros_like(fours, dtype=torch.bool).scatter(2, best, True).flatten(1)
    return masks


def with_zeros(saved: SavedModel, masks: Masks) -> SavedModel:
    """The same model with zeros where a mask says so; nothing of it is smaller or faster."""
    model = deepcopy(saved.model)
    with torch.no_grad():
        for name, mask in masks.items():
            part = model.get_submodule(name)
            assert isinstance(part, nn.Linear)
            part.weight.mul_(mask.to(part.weight))
    return replace(saved, model=model)


def zeros(model: nn.Module) -> float:
    """The share of a model's weights that are 0."""
    weights = list(model.parameters())
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))
