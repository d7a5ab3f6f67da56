"""Scores gathered while a model is trained: which units its steps make larger (movement pruning, arXiv 2005.07683)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmformer.compress.criteria import Given
from mmformer.compress.plain import unrolled
from mmformer.compress.sites import Channels, Heads, Site, find_sites, named_layers

FILE = "movement.safetensors"


class Movement(pl.Callback):
    """Sums, for each unit, minus weight times gradient over the steps (equation 6 there), as a whole structure.

    What a step makes larger gains, what it makes smaller loses; the weight is that of the map that reads the unit. The
    scores go to `movement.safetensors` in `folder` when training ends, for `movement_scores`.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.scores: dict[str, Float[Tensor, " _"]] = {}
        self._sites: list[Site] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._sites = list(find_sites(pl_module.model, unrolled(pl_module.hparams["module"]["model"])))
        for site in self._sites:
            self.scores.setdefault(site.paths[0], torch.zeros(site.count))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for site in self._sites:
            self.scores[site.paths[0]] -= _moved(pl_module.model, site)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            save_file(self.scores, self.folder / FILE)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.scores)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores = dict(state_dict)


def movement_scores(run: str | Path) -> Given:
    """The scores of a run that was trained with the callback.

    Raises:
        FileNotFoundError: it was trained without.
    """
    path = Path(run) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: train with +callbacks.movement._target_=mmformer.compress.movement.Movement "
            "+callbacks.movement.folder='${paths.run}'"
        )
    return Given(load_file(path))


def _moved(model: nn.Module, site: Site) -> Float[Tensor, " count"]:
    """Weight times gradient, summed over each unit."""
    if isinstance(site, Heads | Channels):
        weight = site.reading(model).weight
        if weight.grad is None:
            return torch.zeros(site.count)
        return site.by_unit((weight.detach() * weight.grad).float().sum(0)).sum(1).cpu()
    assert not isinstance(site, Heads | Channels)
    totals = [
        sum((float((p.detach() * p.grad).sum()) for p in layer.parameters() if p.grad is not None), 0.0)
        for layer in named_layers(model, site).values()  # pyright: ignore[reportArgumentType]
    ]
    return torch.tensor(totals)
