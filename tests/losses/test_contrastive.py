"""The streamed losses against open_clip's and against plain ones over all logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmformer.losses import contrastive
from mmformer.losses.contrastive import info_nce, sigmoid

open_clip = pytest.importorskip("open_clip.loss", reason="open_clip's losses are the oracle")

IDS = torch.tensor([3, 1, 2, 3, 4, 5, 2, 3, 6, 7, 8])


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, none of which divides the rows."""
    monkeypatch.setattr(contrastive, "_CPU_TILE", (4, 3))


def inputs(rows: int = 11, dim: int = 6, dtype: torch.dtype = torch.float64, scale: float = 14.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(rows)
    a, b = (F.normalize(torch.randn(rows, dim, generator=draw, dtype=torch.float64), dim=1) for _ in range(2))
    return [x.to(dtype) for x in (a, b, torch.tensor(scale), torch.tensor(-3.0))]


def with_gradients(loss: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    """The loss and the gradients of 1.7 times it."""
    leaves = [x.clone().requires_grad_() for x in given]
    value = loss(*leaves)
    found = torch.autograd.grad(1.7 * value, leaves, allow_unused=True)
    return [value.detach(), *(x for x in found if x is not None)]


def assert_equal(mine: list[Tensor], theirs: list[Tensor], within: float) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (a - b).norm() <= within * b.norm(), f"{float((a - b).norm() / b.norm()):.1e}"


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [1, 4, 11])
def test_open_clip_says_the_same(rows: int, dtype: torch.dtype, within: float) -> None:
    a, b, scale, bias = inputs(rows, dtype=dtype)
    if rows > 1:  # a single pair has no gradient but rounding
        assert_equal(with_gradients(info_nce, a, b, scale), with_gradients(open_clip.ClipLoss(), a, b, scale), within)
    theirs = with_gradients(open_clip.SigLipLoss(), a, b, scale, bias)
    assert_equal(with_gradients(sigmoid, a, b, scale, bias), theirs, within)


def test_half_precision_inputs_are_computed_in_full_and_get_their_gradients_back_in_half() -> None:
    a, b, scale, bias = inputs(dtype=torch.bfloat16)
    for mine, theirs in ((info_nce, open_clip.ClipLoss()), (sigmoid, open_clip.SigLipLoss())):
        given = (a, b, scale.float(), bias.float())[: 4 if mine is sigmoid else 3]
        with torch.autocast("cpu", torch.bfloat16):
            found = with_gradients(mine, *given)
        full = with_gradients(theirs, *(x.float() for x in given))
        assert [x.dtype for x in found[1:3]] == [torch.bfloat16] * 2
        assert_equal(found, [x.to(y.dtype) for x, y in zip(full, found, strict=True)], 1e-3)
        assert_equal([found[0], found[3]], [full[0], full[3]], 2e-6)


def plain_info_nce(a: Tensor, b: Tensor, scale: Tensor, ids: Tensor | None, soft: bool, smoothing: float) -> Tensor:
    """Over all logits, with its targets written out."""
    across, down = scale.reshape(-1).expand(2)
    target = torch.eye(len(a), dtype=a.dtype)
    left_out = torch.zeros(len(a), len(a)).bool()
    if ids is not None:
        same = ids[:, None] == ids
        target = same.to(a.dtype) / same.sum(1, keepdim=True) if soft else target
        left_out = left_out if soft else same & ~target.bool()
    target = (1 - smoothing) * target + smoothing / len(a)
    both = (across * a @ b.T, down * b @ a.T)
    return sum(F.cross_entropy(x.masked_fill(left_out, -1e9), target) for x in both) / 2  # pyright: ignore


OPTIONS = [
    {"ids": None, "soft": False, "smoothing": 0.1},
    {"ids": IDS, "soft": False, "smoothing": 0.0},
    {"ids": IDS, "soft": True, "smoothing": 0.0},
    {"ids": IDS, "soft": True, "smoothing": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scale", [14.0, [14.0, 5.0]])
def test_targets_of_every_kind_are_those_written_out(options: dict, scale: float | list[float]) -> None:
    a, b, _, _ = inputs()
    given = a, b, torch.tensor(scale, dtype=torch.float64)
    mine = with_gradients(lambda a, b, s: info_nce(a, b, s, **options), *given)
    assert_equal(mine, with_gradients(lambda a, b, s: plain_info_nce(a, b, s, **options), *given), 1e-12)


@pytest.mark.parametrize("soft", [False, True])
def test_pairs_of_equal_ids_are_left_out_or_match(soft: bool) -> None:
    same, own = IDS[:, None] == IDS, torch.eye(len(IDS)).bool()

    def plain(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        sign = torch.where(same if soft else own, 1.0, -1.0)
        losses = -F.logsigmoid(sign * (scale * a @ b.T + bias))
        return (losses if soft else losses[~same | own]).sum() / len(a)

    mine = with_gradients(lambda a, b, s, bias: sigmoid(a, b, s, bias, IDS, soft=soft), *inputs())
    assert_equal(mine, with_gradients(plain, *inputs()), 1e-12)


@given(rows=st.integers(2, 9), dim=st.integers(1, 7), height=st.integers(1, 10), width=st.integers(1, 10))
def test_any_tile_gives_the_same(rows: int, dim: int, height: int, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for loss in (lambda a, b, s, bias: info_nce(a, b, s), sigmoid):
            found = []
            for tile in ((height, width), (64, 64)):
                patch.setattr(contrastive, "_CPU_TILE", tile)
                found.append(with_gradients(loss, *inputs(rows, dim)))
            for mine, whole in zip(*found, strict=True):
                torch.testing.assert_close(mine, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_logits_far_apart_neither_overflow_nor_vanish(size: float) -> None:
    """No bound on the logits is assumed: rows of any length, and rows that are like nothing."""
    a, b, _, bias = inputs(dtype=torch.float32)
    a, scale = a * torch.logspace(-2, 1, len(a))[:, None] * size, torch.tensor(100.0)
    for loss in (lambda a, b, s: info_nce(a, b, s), lambda a, b, s: sigmoid(a, b, s, bias)):
        found = with_gradients(loss, a, b, scale)
        exact = with_gradients(lambda *x, loss=loss: loss(*(y.double() for y in x)), a, b, scale)
        assert_equal(found, [x.to(y.dtype) for x, y in zip(exact, found, strict=True)], 1e-5)


def test_no_gradient_is_made_where_none_is_recorded() -> None:
    a, b, scale, bias = inputs()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert not sigmoid(a.requires_grad_(), b, scale, bias).requires_grad
    assert info_nce(a, b, scale).requires_grad


def test_no_pair_is_a_loss_of_zero() -> None:
    a, b, scale, bias = inputs(4)
    assert float(info_nce(a[:0], b[:0], scale)) == float(sigmoid(a[:0], b[:0], scale, bias)) == 0.0


def test_smoothing_over_what_is_no_negative_is_refused() -> None:
    a, b, scale, _ = inputs()
    with pytest.raises(ValueError, match=r"smoothing=0\.1 with ids .* choose soft=True"):
        info_nce(a, b, scale, ids=IDS, smoothing=0.1)
