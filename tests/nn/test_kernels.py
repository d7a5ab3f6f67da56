"""Every kernel is the dense one. FlexAttention has no backward on a CPU, so its gradient is not looked at here; the
variable-length flash kernel runs on CUDA only."""

import warnings

import pytest
import torch

from mmformer.nn import kernels
from mmformer.tokens import merge, to_padded
from mmformer.visibility import Sight
from tests.helpers import packed_tokens
from tests.test_visibility import RULES, stream

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(query, key, heads=4, groups=2, dtype=torch.float32, dim=8):
    generator = torch.Generator().manual_seed(3)

    def one(tokens, n):
        x = torch.randn(*tokens.x.shape[:2], n, dim, generator=generator, dtype=torch.float32)
        return x.to(dtype).requires_grad_()

    return one(query, heads), one(key, groups), one(key, groups)


def run(kernel, q, k, v, sight):
    out = kernel(q, k, v, sight)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype)
    return out, *torch.autograd.grad((out * weight).sum(), (q, k, v), allow_unused=True)


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_grouped_is_dense_forward_and_backward(rule, cross, dtype, precision, monkeypatch):
    monkeypatch.setattr(kernels, "PLAIN_KEYS", 768 if precision == "medium" else 0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    query = stream()
    key = merge([packed_tokens({3: 2, 0: 3, 1: 4}, 4, 4, "text", 5)]) if cross else query
    sight = Sight(rule, query, key)
    q, k, v = draw(query, key, dtype=dtype)
    try:
        for got, expected in zip(run(kernels.grouped, q, k, v, sight), run(kernels.dense, q, k, v, sight), strict=True):
            torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 2)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.traced
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_flex_is_dense_forward(rule):
    tokens = stream()
    sight = Sight(rule, tokens, tokens)
    q, k, v = (t.detach() for t in draw(tokens, tokens))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it advises to compile, once a process
        got = kernels.flex(q, k, v, sight)
    torch.testing.assert_close(got, kernels.dense(q, k, v, sight), rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_gathers_zeros_and_gives_finite_gradients():
    query, key = packed_tokens({0: 3, 1: 2}, 2, 4), packed_tokens({1: 4}, 2, 4)
    sight = Sight(RULES[0], query, key)
    for kernel in (kernels.grouped, kernels.dense):
        out, *gradients = run(kernel, *draw(query, key), sight)
        assert out[0, :3].abs().max() == 0
        assert out[0, 3:].abs().min() > 0
        assert all(g.isfinite().all() for g in gradients)


def test_cumulative_lengths_are_those_of_the_samples():
    query, key = packed_tokens({1: 2, 0: 3}, 3, 4), packed_tokens({1: 4, 2: 1}, 3, 4)
    bounds_q, bounds_k, longest_q, longest_k = Sight(RULES[0], query, key).cumulative
    assert bounds_q.tolist() == [0, 2, 5]
    assert bounds_k.tolist() == [0, 4, 4]
    assert (longest_q, longest_k) == (3, 4)
    with pytest.raises(ValueError, match="another order"):
        _ = Sight(RULES[0], packed_tokens({0: 1, 1: 1}, 2, 4), packed_tokens({1: 4, 0: 1}, 2, 4)).cumulative


def test_padded_rows_use_the_dense_kernel():
    tokens = to_padded(stream())
    q, k, v = draw(tokens, tokens)
    sight = Sight(RULES[1], tokens, tokens)
    assert torch.equal(kernels.attend(q, k, v, sight), kernels.dense(q, k, v, sight))
