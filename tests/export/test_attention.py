"""Attention in plain operations is the dense kernel, also where a query sees nothing."""

import pytest
import torch

from mmformer.export.attention import written_out
from mmformer.nn import kernels
from mmformer.tokens import to_padded
from mmformer.visibility import Sight
from tests.helpers import packed_tokens
from tests.nn.test_kernels import TOLERANCE, draw, run
from tests.test_visibility import RULES, stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_written_out_is_dense_forward_and_backward(rule, cross, dtype):
    query = to_padded(stream())
    key = to_padded(packed_tokens({1: 4, 3: 2}, 4, 4)) if cross else query
    sight = Sight(rule, query, key)
    q, k, v = draw(query, key, dtype=dtype)
    wanted, *gradients = run(kernels.dense, q, k, v, sight)
    got, *others = run(written_out, q, k, v, sight)
    real = query.valid
    torch.testing.assert_close(got[real], wanted[real], rtol=0, atol=TOLERANCE[dtype])
    if real.all() or not rule.full or cross:  # padding that is let see itself whole gives gradients of its own
        for mine, theirs in zip(others, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=4 * TOLERANCE[dtype])


def test_a_query_that_sees_nothing_gathers_zeros():
    query, key = to_padded(packed_tokens({0: 3, 1: 2}, 2, 4)), to_padded(packed_tokens({1: 4}, 2, 4))
    out = written_out(*draw(query, key), Sight(RULES[0], query, key))
    assert out[0].abs().max() == 0
    assert out[1, :2].abs().min() > 0
