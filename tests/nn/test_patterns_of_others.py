"""Windows with global tokens are Longformer's, and random blocks BigBird's, forward and backward."""

import numpy as np
import pytest
import torch

from mmformer.nn.sparse import sparse
from mmformer.patterns import BigBird, Window
from mmformer.tokens import to_padded
from mmformer.visibility import Sight, Visibility
from tests.helpers import packed_tokens, scramble

pytest.importorskip("transformers", reason="the reference implementations are those of transformers")
SAMPLES, LENGTH, HEADS, DIM = 2, 192, 4, 32


def ours(module, x, rule):
    """Our attention with the maps of a reference."""
    tokens = to_padded(packed_tokens(dict.fromkeys(range(SAMPLES), LENGTH), SAMPLES, DIM))
    q, k, v = (part(x).unflatten(-1, (HEADS, -1)) for part in (module.query, module.key, module.value))
    return sparse(q, k, v, Sight(Visibility(patterns=rule), tokens, tokens)).flatten(2)


def check(module, theirs, rule):
    x = torch.randn(SAMPLES, LENGTH, DIM, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = []
    for out in (ours(module, x, rule), theirs(x)):
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found.append((out, *torch.autograd.grad((out * weight).sum(), x)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_window_with_global_tokens_is_longformers():
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(hidden_size=DIM, num_attention_heads=HEADS, attention_window=[32])
    module = scramble(LongformerSelfAttention(config, 0)).eval()
    for name in ("query", "key", "value"):  # Longformer has maps of their own for what is global
        getattr(module, f"{name}_global").load_state_dict(getattr(module, name).state_dict())
    mask = torch.zeros(SAMPLES, LENGTH)
    mask[:, :3] = 10000

    def theirs(x):
        flags = {"is_index_masked": mask < 0, "is_index_global_attn": mask > 0, "is_global_attn": True}
        return module(x, attention_mask=mask, **flags)[0]

    check(module, theirs, Window(16, first=3))


def test_random_blocks_are_bigbirds():
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    size, rule = 16, BigBird(16, random=3, seed=7)
    config = BigBirdConfig(hidden_size=DIM, num_attention_heads=HEADS, block_size=size, num_random_blocks=3)
    module = scramble(BigBirdBlockSparseAttention(config, seed=0)).eval()
    blocks = torch.arange(1, LENGTH // size - 1)
    count = torch.full_like(blocks, LENGTH // size)
    table = torch.stack([rule.random_block(blocks, count, turn) for turn in range(3)], 1).numpy().astype(np.int32)
    module._bigbird_block_rand_mask_with_head = lambda **_: [table] * HEADS
    blocked, band, mine, theirs_mask = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(SAMPLES, LENGTH), size
    )
    check(module, lambda x: module(x, band, mine, theirs_mask, blocked, blocked)[0], rule)
