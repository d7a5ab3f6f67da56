"""Activation checkpointing belongs to a run: the callback sets it, weights and files know nothing of it."""

from __future__ import annotations

import pytest

from mmformer.nn import Transformer
from mmformer.training.recompute import RecomputeLayers
from tests.training.toy import Toy, digest, toy_trainer, toy_training


def fit(folder, *callbacks):
    data, module = Toy(), toy_training()
    data.setup()
    toy_trainer(folder, 4, callbacks=list(callbacks)).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("keep_products", [False, True])
def test_a_run_that_computes_again_is_the_run_that_keeps(tmp_path, keep_products):
    found = fit(tmp_path / "again", RecomputeLayers(every=1, keep_products=keep_products))
    assert digest(found) == digest(fit(tmp_path / "kept"))
    parts = [part for part in found.model.modules() if isinstance(part, Transformer)]
    assert parts
    assert all(part.recompute is not None for part in parts)


def test_a_model_without_layers_is_told(tmp_path):
    module = toy_training()
    module.model.fusion.transformer = Transformer(16, 0, [])
    trainer = toy_trainer(tmp_path, 1)
    with pytest.raises(ValueError, match="finds no Transformer layer"):
        RecomputeLayers(every=1, keep_products=False).setup(trainer, module, "fit")
