import pytest
import torch
from torch import nn

from mmformer.nn import AttentionPool, CrossAttention
from mmformer.pooling import FirstPool, LastPool, has_tokens
from mmformer.tokens import to_padded
from tests.helpers import packed_tokens, scramble


def of_sample(tokens, sample):
    return tokens.x[tokens.sample() == sample]


@pytest.mark.parametrize("padded", [False, True])
def test_first_and_last_tokens_of_each_sample(padded):
    tokens = packed_tokens({3: 2, 0: 5, 2: 1}, 5, 6)
    tokens = to_padded(tokens) if padded else tokens
    assert has_tokens(tokens).tolist() == [True, False, True, True, False]
    for sample in (0, 2, 3):
        own = of_sample(tokens, sample)
        torch.testing.assert_close(FirstPool()(tokens)[sample], own[0])
        torch.testing.assert_close(LastPool()(tokens)[sample], own[-1])
    torch.testing.assert_close(FirstPool(2)(tokens)[0], of_sample(tokens, 0)[:2].mean(0))
    assert LastPool()(tokens)[[1, 4]].abs().sum() == 0


@pytest.mark.parametrize("padded", [False, True])
def test_attention_pool_is_multi_head_attention_of_one_query(padded):
    pool = scramble(AttentionPool(12, lambda dim: CrossAttention(dim, 3)))
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([pool.attention.query.weight, pool.attention.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([pool.attention.query.bias, pool.attention.key_value.bias]))
        theirs.out_proj.load_state_dict(pool.attention.out.state_dict())
    tokens = packed_tokens({2: 3, 0: 5}, 3, 12)
    tokens = to_padded(tokens) if padded else tokens
    out = pool(tokens)
    for sample in (0, 2):
        own = of_sample(tokens, sample)[None]
        x = theirs(pool.query[None], own, own, need_weights=False)[0][0, 0]
        torch.testing.assert_close(out[sample], x + pool.feedforward(pool.norm(x)), rtol=1e-5, atol=1e-5)
