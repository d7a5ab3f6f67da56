import pytest
import torch

from mmformer.compress.masks import importance, two_of_four, unstructured, with_zeros, zeros
from tests.compress.models import batch_of, saved_model


def test_a_share_of_each_row_becomes_zero_and_the_largest_stay():
    saved = saved_model()
    masks = unstructured(importance(saved.model), 0.5)
    assert "heads.answer.out" not in masks
    sparse = with_zeros(saved, masks).model
    for name, mask in masks.items():
        old, new = (model.get_submodule(name).weight.detach() for model in (saved.model, sparse))
        assert torch.equal(new, torch.where(mask, old, 0))
        assert int(mask.sum(1).min()) == int(mask.sum(1).max()) == mask.shape[1] - round(0.5 * mask.shape[1])
        for row, kept in zip(old.abs(), mask, strict=True):
            assert row[kept].min() >= row[~kept].max()
    assert 0.3 < zeros(sparse) < 0.5
    assert sum(p.numel() for p in sparse.parameters()) == sum(p.numel() for p in saved.model.parameters())


def test_of_every_four_weights_two_stay():
    saved = saved_model()
    masks = two_of_four(importance(saved.model, [batch_of(9)]))
    assert masks
    for mask in masks.values():
        assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_inputs_that_are_always_zero_make_weights_worthless():
    saved, batches = saved_model(), [batch_of(9), batch_of(9, 1)]
    down = saved.model.get_submodule("fusion.transformer.layers.0.feedforward")
    with torch.no_grad():
        down.up.weight[3] = 0
        down.up.bias[3] = -20
        down.down.weight[:, 3] = 100
    name = "fusion.transformer.layers.0.feedforward.down"
    assert (importance(saved.model)[name].argmax(1) == 3).all()
    assert (importance(saved.model, batches)[name].argmin(1) == 3).all()
    norms = []
    hook = saved.model.get_submodule(name).register_forward_pre_hook(lambda _, x: norms.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            saved.model.fuse(saved.model.encode(batch))
    hook.remove()
    wanted = saved.model.get_submodule(name).weight.detach().abs() * torch.cat(norms).norm(dim=0)
    torch.testing.assert_close(importance(saved.model, batches)[name], wanted, rtol=1e-4, atol=1e-5)


def test_a_share_is_one():
    with pytest.raises(ValueError, match=r"share=1\.2"):
        unstructured({}, 1.2)
