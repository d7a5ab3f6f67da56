from types import SimpleNamespace

import pytest
import torch

from mmformer.compress.costs import Parameters
from mmformer.compress.criteria import Subject
from mmformer.compress.movement import Movement, movement_scores
from mmformer.compress.prune import plan
from mmformer.compress.sites import Heads, Layers
from tests.compress.models import batch_of, saved_model
from tests.compress.test_prune import sites_of


def test_what_steps_make_larger_has_the_higher_score(tmp_path):
    saved, batch = saved_model(), batch_of(12)
    module = SimpleNamespace(model=saved.model, hparams={"module": {"model": saved.config["model"]}})
    callback, wanted = Movement(str(tmp_path)), {}
    callback.setup(None, module, "fit")
    subject = Subject(saved.model, [], saved.objectives, [])
    for _ in range(2):
        saved.model.zero_grad()
        subject.loss(batch).backward()
        callback.on_before_optimizer_step(None, module, None)
        for site in sites_of(saved):
            if isinstance(site, Heads):
                weight = site.reading(saved.model).weight
                moved = -(weight.detach() * weight.grad).sum(0).view(site.count, -1).sum(1)
                wanted[site.paths[0]] = wanted.get(site.paths[0], 0) + moved
    for name, scores in wanted.items():
        torch.testing.assert_close(callback.scores[name], scores, rtol=1e-4, atol=1e-6)
    resumed = Movement(str(tmp_path))
    resumed.load_state_dict(callback.state_dict())
    resumed.setup(None, module, "fit")
    assert torch.equal(resumed.scores[name], callback.scores[name])
    callback.on_fit_end(SimpleNamespace(is_global_zero=True), module)
    chosen = plan(saved, [batch], movement_scores(tmp_path), Parameters(), 0.9)
    kept = dict(zip([site.paths[0] for site in chosen.sites], chosen.kept, strict=True))
    assert any(len(kept[site.paths[0]]) < site.count for site in chosen.sites)
    layers = next(site for site in chosen.sites if isinstance(site, Layers))
    assert len(callback.scores[layers.paths[0]]) == layers.count


def test_a_run_that_was_trained_without_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"movement\.safetensors is missing: train with \+callbacks"):
        movement_scores(tmp_path)
