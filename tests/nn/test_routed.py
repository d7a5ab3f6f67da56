"""Routed attention is dense attention under the mask of what was chosen, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmformer.nn import Routed, kernels
from mmformer.tokens import Tokens, to_padded
from mmformer.visibility import Sight, Visibility
from tests.helpers import packed_tokens
from tests.nn.test_kernels import TOLERANCE, draw, run
from tests.nn.test_sparse import mixed

RULES = [
    Visibility(),
    Visibility(causal=True),
    Visibility(causal=True, window=30),
    Visibility(sees={"text": ["text"], "image": []}),
]


def chosen_mask(q, k, sight: Sight, routed: Routed) -> torch.Tensor:
    """Which keys each head of each query looks at, one query at a time (arXiv 2502.13189, equations 5 and 6)."""
    dense = sight.dense[:, 0]
    mask = torch.zeros(len(dense), q.shape[2], *dense.shape[1:], dtype=torch.bool)
    mine, theirs = sight.owners
    keys = k.detach().float().repeat_interleave(q.shape[2] // k.shape[2], 2)
    times, causal, is_self = sight.key.position[..., 0], sight.visibility.causal, sight.query is sight.key
    for b, owner in ((row, i) for row in range(len(dense)) for i in theirs[row].unique() if i >= 0):
        blocks = (theirs[b] == owner).nonzero()[:, 0].split(routed.size)
        latest = [int(times[b, block].max()) for block in blocks]
        scores = torch.einsum("thd,nhd->thn", q[b].detach().float(), torch.stack([keys[b, i].mean(0) for i in blocks]))
        for t in (mine[b] == owner).nonzero()[:, 0].tolist():
            own = [i for i, block in enumerate(blocks) if is_self and t in block.tolist()]
            may = [i for i in range(len(blocks)) if not causal or latest[i] <= sight.query.position[b, t, 0]]
            for h, score in enumerate(scores[t].tolist()):
                best = sorted((i for i in may if i not in own), key=lambda i: -score[i])[: routed.top - len(own)]
                for i in [*own, *best]:
                    mask[b, h, t, blocks[i]] = dense[b, t, blocks[i]]
    return mask


def check(query: Tokens, key: Tokens, rule: Visibility, routed: Routed, dtype=torch.float32) -> None:
    sight = Sight(rule, query, key)
    q, k, v = draw(query, key, dtype=dtype)
    mask = chosen_mask(q, k, sight, routed)

    def oracle(q, k, v, sight):
        keys, values = (t.repeat_interleave(q.shape[2] // t.shape[2], 2).transpose(1, 2) for t in (k, v))
        scores = (q.transpose(1, 2) @ keys.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~mask, -1e30)
        weights = torch.where(mask.any(-1, keepdim=True), scores.softmax(-1), 0)
        return (weights @ values).transpose(1, 2)

    for got, expected in zip(run(routed, q, k, v, sight), run(oracle, q, k, v, sight), strict=True):
        torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_routed_is_dense_over_what_was_chosen(rule, padded, dtype):
    tokens = mixed([20, 0, 3, 1, 30], [(2, 3), (4, 5), (0, 0)])
    tokens = to_padded(tokens) if padded else tokens
    check(tokens, tokens, rule, Routed(8, 3), dtype)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(RULES),
    st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 33]), min_size=1, max_size=4).filter(any),
    st.sampled_from([Routed(16, 1), Routed(8, 2), Routed(5, 9)]),
)
def test_routed_is_dense_over_what_was_chosen_for_any_lengths(rule, lengths, routed):
    tokens = mixed(lengths, [])
    check(tokens, tokens, rule, routed)


def test_of_a_context_the_best_blocks_are_seen():
    query, key = packed_tokens({1: 9, 0: 4, 2: 5}, 4, 4), packed_tokens({0: 30, 1: 50, 3: 4}, 4, 4, seed=2)
    check(query, key, RULES[0], Routed(8, 2))


def test_all_blocks_chosen_is_full_attention():
    tokens = mixed([100, 30], [])
    sight = Sight(Visibility(causal=True), tokens, tokens)
    q, k, v = draw(tokens, tokens)
    wide = Routed(16, 50)
    for got, expected in zip(run(wide, q, k, v, sight), run(kernels.dense, q, k, v, sight), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_no_block_is_refused():
    with pytest.raises(ValueError, match="0 blocks of 16 tokens"):
        Routed(16, 0)
