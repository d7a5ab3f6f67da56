"""Quantizers: equal to vector_quantize_pytorch on the same codebook, and exact there and back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmformer.nn import FSQ, ResidualVQ, VectorQuantizer

LEVELS = [[8, 5, 5, 5], [3, 4, 5], [8, 8, 8, 5, 5, 5], [7]]


def reference():
    reason = "needs vector_quantize_pytorch, the reference that these quantizers are compared with"
    return pytest.importorskip("vector_quantize_pytorch", reason=reason)


def vectors(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) * 1.5


def gradient(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of an output with unequal weights, so that no channel stands for another."""
    weights = torch.linspace(-1, 2, output.numel()).view_as(output)
    (found,) = torch.autograd.grad((output * weights).sum(), x, retain_graph=True)
    return found


def pair(size: int = 37, dim: int = 6, dead_below: float = 0.0):
    """Our quantizer and the reference's with one state."""
    theirs = reference().VectorQuantize(
        dim, size, decay=0.9, commitment_weight=0.25, rotation_trick=False, threshold_ema_dead_code=dead_below
    )
    ours = VectorQuantizer(dim, size, decay=0.9, commitment=0.25, dead_below=dead_below)
    share(ours, theirs)
    return ours, theirs


def share(ours, theirs) -> None:
    codebook = vectors(ours.sizes[0], ours.dim, seed=5)
    count = torch.rand(len(codebook), generator=torch.Generator().manual_seed(6)) * 9
    book = theirs._codebook
    for mine, other, value in (
        (ours.codebook, book.embed, codebook),
        (ours.count, book.cluster_size, count),
        (ours.total, book.embed_avg, codebook * count[:, None]),
    ):
        mine.copy_(value)
        other.copy_(value[None])


# ------------------------------------------------------------------ finite scalar quantization


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_fsq_is_the_reference(levels):
    ours, theirs = FSQ(levels), reference().FSQ(levels)
    x = vectors(500, len(levels)).requires_grad_()
    found = ours(x)
    wanted, ids = theirs(x[None])
    torch.testing.assert_close(found.x, wanted[0])
    assert torch.equal(found.ids[:, 0], ids[0].long())
    torch.testing.assert_close(gradient(found.x, x), gradient(wanted[0], x))
    assert ours.sizes == (theirs.codebook_size,)
    assert found.commitment is None


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_fsq_code_comes_back(levels):
    fsq = FSQ(levels)
    ids = torch.arange(fsq.sizes[0])[:, None]
    assert torch.equal(fsq.index(fsq.vectors(ids)), ids)
    assert len(fsq.vectors(ids).unique(dim=0)) == fsq.sizes[0]
    torch.testing.assert_close(fsq.vectors(ids), reference().FSQ(levels).implicit_codebook, rtol=0, atol=0)


@given(st.lists(st.integers(3, 12), min_size=1, max_size=6), st.integers(0, 1000))
def test_fsq_ids_stand_for_what_came_with_them(levels, seed):
    fsq = FSQ(levels)
    x = vectors(64, len(levels), seed) * 4
    found = fsq(x)
    assert torch.equal(fsq.vectors(found.ids), found.x)
    assert torch.equal(fsq.nearest(x), found.ids)
    assert 0 <= int(found.ids.min()) <= int(found.ids.max()) < fsq.sizes[0]


def test_fsq_has_nothing_to_save_and_refuses_two_levels():
    assert not FSQ([8, 5]).state_dict()
    with pytest.raises(ValueError, match="at least 3"):
        FSQ([8, 2])


# ------------------------------------------------------------------ vector quantization


def test_a_vector_becomes_its_nearest_code_with_a_straight_gradient():
    ours, theirs = pair()
    x = vectors(200, 6).requires_grad_()
    ours.decay = theirs._codebook.decay = 1.0
    found = ours.train()(x)
    wanted, ids, loss = theirs.train()(x[None])
    assert torch.equal(found.ids[:, 0], torch.cdist(x, ours.codebook).argmin(1))
    assert torch.equal(found.ids[:, 0], ids[0])
    torch.testing.assert_close(found.x, wanted[0])
    torch.testing.assert_close(found.commitment, loss)
    torch.testing.assert_close(gradient(found.x, x), gradient(wanted[0], x))
    torch.testing.assert_close(gradient(found.commitment, x), gradient(loss, x))


@pytest.mark.parametrize("dead_below", [0.0, 2.0])
def test_the_codebook_learns_as_the_references(dead_below):
    ours, theirs = pair(dead_below=dead_below)
    for step in range(5):
        x = vectors(120, 6, seed=10 + step) + step
        torch.manual_seed(step)
        found = ours.train()(x)
        torch.manual_seed(step)
        _, ids, _ = theirs.train()(x[None])
        assert torch.equal(found.ids[:, 0], ids[0])
        torch.testing.assert_close(ours.codebook, theirs._codebook.embed[0])
        torch.testing.assert_close(ours.count, theirs._codebook.cluster_size[0])
        torch.testing.assert_close(ours.total, theirs._codebook.embed_avg[0])


def test_a_dead_code_becomes_a_vector_of_the_batch():
    quantizer = VectorQuantizer(4, 16).train()
    x = vectors(300, 4) + 50  # nowhere near the first codebook: all of it but one is dead
    quantizer(x)
    drawn = (quantizer.codebook[:, None] == x).all(-1)
    assert int(drawn.any(1).sum()) >= 15
    assert int(drawn.any(0).sum()) == int(drawn.any(1).sum()), "two dead codes became the same vector"
    for _ in range(100):  # the one that lived, far away as it is, is forgotten too
        quantizer(x)
    assert len(quantizer.nearest(x).unique()) == 16


def test_dead_codes_beyond_the_vectors_of_a_batch_wait():
    quantizer = VectorQuantizer(4, 16).train()
    before = quantizer.codebook.clone()
    quantizer(vectors(3, 4) + 50)
    assert int((quantizer.count == 2).sum()) == 3
    assert len(quantizer.codebook.unique(dim=0)) == 16
    assert before.shape == quantizer.codebook.shape


def test_codes_come_back_and_nothing_is_learned_outside_of_training():
    quantizer, _ = pair()
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    x = vectors(100, 6)
    found = quantizer.eval()(x)
    quantizer.train().nearest(x)
    assert torch.equal(quantizer.vectors(found.ids), found.x)
    ids = torch.arange(37)[:, None]
    assert torch.equal(quantizer.nearest(quantizer.vectors(ids)), ids)
    assert set(state) == {"codebook", "count", "total"}
    assert all(torch.equal(value, quantizer.state_dict()[name]) for name, value in state.items())


def test_half_precision_around_it_does_not_change_the_codes():
    quantizer, _ = pair()
    x = vectors(400, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.eval()(x).ids, quantizer.nearest(x))
        inside = quantizer.nearest(x)
    assert torch.equal(inside, quantizer.nearest(x))


# ------------------------------------------------------------------ residual vector quantization


def residual_pair(stages: int = 3, size: int = 19, dim: int = 6):
    theirs = reference().ResidualVQ(
        dim=dim, codebook_size=size, num_quantizers=stages, decay=0.9, commitment_weight=0.25, rotation_trick=False
    )
    ours = ResidualVQ(stages, partial(VectorQuantizer, dim, size, decay=0.9, dead_below=0.0))
    for i, (mine, other) in enumerate(zip(ours.stages, theirs.layers, strict=True)):
        share(mine, other)
        book = other._codebook
        for tensor in (mine.get_buffer("codebook"), mine.get_buffer("total"), book.embed, book.embed_avg):
            tensor.mul_(0.5**i)
    return ours, theirs


def test_residual_quantization_is_the_references():
    ours, theirs = residual_pair()
    x = vectors(200, 6).requires_grad_()
    found = ours.train()(x)
    wanted, ids, losses = theirs.train()(x[None])
    assert torch.equal(found.ids, ids[0])
    torch.testing.assert_close(found.x, wanted[0])
    torch.testing.assert_close(found.commitment, losses.sum())
    torch.testing.assert_close(gradient(found.commitment, x), gradient(losses.sum(), x))
    # The reference adds a straight-through gradient for each stage; the derivative of a sum near x is one.
    torch.testing.assert_close(3 * gradient(found.x, x), gradient(wanted[0], x))
    for mine, other in zip(ours.stages, theirs.layers, strict=True):
        torch.testing.assert_close(mine.codebook, other._codebook.embed[0])


def test_residual_ids_stand_for_what_came_with_them_and_a_few_for_something_coarser():
    ours, theirs = residual_pair()
    x = vectors(200, 6)
    found = ours.eval()(x)
    assert ours.sizes == (19, 19, 19)
    assert torch.equal(ours.vectors(found.ids), found.x)
    assert torch.equal(ours.nearest(x), found.ids)
    torch.testing.assert_close(found.x, theirs.get_output_from_indices(found.ids[None])[0])
    errors = [float((ours.vectors(found.ids[:, :stages]) - x).square().mean()) for stages in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)


def test_bits():
    assert FSQ([8, 8, 4]).bits == 8
    assert ResidualVQ(4, partial(VectorQuantizer, 6, 256)).bits == 32
