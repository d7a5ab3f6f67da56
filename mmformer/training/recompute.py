"""Activation checkpointing of a run: `callbacks=recompute`."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from mmformer.nn import Transformer
from mmformer.nn.recompute import Recompute


class RecomputeLayers(Callback):
    """Lets every Transformer of the model that trains drop what its layers make, and compute it again (`Recompute`).

    It belongs to the run and not to the model: nothing of it is saved.

    Raises:
        ValueError: a model without Transformer layers.
    """

    def __init__(self, every: int, keep_products: bool) -> None:
        super().__init__()
        self.recompute = Recompute(every=every, keep_products=keep_products)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        found = [part for part in pl_module.model.modules() if isinstance(part, Transformer)]
        if not any(part.layers for part in found):
            raise ValueError(
                "callbacks.recompute finds no Transformer layer in this model, so there is nothing to compute again:"
                " leave it out (callbacks.recompute=null)"
            )
        for part in found:
            part.recompute = self.recompute
