from functools import partial

import torch
from torch import nn

from mmformer.nn import Attention, Block, ByModality, CrossAttention, FeedForward, Gated, Scaled, Transformer
from mmformer.tokens import LATENT, merge, modality_id, to_padded
from tests.helpers import packed_tokens, scramble


def mixed():
    return merge(
        [packed_tokens({0: 2, 1: 2, 2: 2}, 3, 12, LATENT), packed_tokens({0: 3, 2: 5}, 3, 12, "text", 2)],
    )


def test_each_token_goes_through_the_weights_of_its_modality():
    tokens = mixed()
    part = scramble(ByModality(12, FeedForward, [LATENT]))
    out = part(tokens)
    mine = tokens.modality == modality_id(LATENT)
    torch.testing.assert_close(out[mine], part.parts[LATENT](tokens.x[mine]))
    torch.testing.assert_close(out[~mine], part.parts["others"](tokens.x[~mine]))


def test_experts_in_a_transformer_are_the_same_packed_and_padded():
    experts = partial(ByModality, part=FeedForward, modalities=[LATENT, "image"])
    norms = partial(ByModality, part=nn.LayerNorm, modalities=[LATENT])
    layer = partial(Block, attention=partial(Attention, num_heads=2), feedforward=experts, norm=norms)
    model = scramble(Transformer(12, 2, [layer]))
    tokens = mixed()
    out, padded = to_padded(model(tokens)), model(to_padded(tokens))
    torch.testing.assert_close(out.x[out.valid], padded.x[padded.valid], rtol=1e-5, atol=1e-5)


def test_norms_may_differ_from_branch_to_branch():
    norm = {"attention": nn.LayerNorm, "cross": nn.LayerNorm, "feedforward": nn.RMSNorm}
    layer = Block(12, attention=partial(Attention, num_heads=2), norm=norm)
    assert isinstance(layer.attention_norm, nn.LayerNorm)
    assert isinstance(layer.feedforward_norm, nn.RMSNorm)


def test_a_gated_branch_is_silent_at_first_and_learns():
    gated = partial(Gated, part=partial(CrossAttention, num_heads=2))
    layer = Block(12, cross=gated, feedforward=partial(Gated, part=FeedForward))
    model = Transformer(12, 1, [lambda dim: layer], norm=None)
    tokens, context = packed_tokens({0: 3}, 1, 12), packed_tokens({0: 4}, 1, 12, seed=3)
    out = model(tokens, context).x
    assert torch.equal(out, tokens.x)
    out.square().sum().backward()
    assert layer.cross.gate.grad.abs() > 0


def test_layer_scale_multiplies_the_branch():
    plain = scramble(FeedForward(12))
    scaled = Scaled(12, lambda dim: plain, 0.5)
    x = torch.randn(3, 12)
    torch.testing.assert_close(scaled(x), 0.5 * plain(x))
