from functools import partial

import pytest
import torch
from torch import nn

from mmformer.nn import Attention, Block, CrossAttention, FeedForward, Looped, Rotary, Transformer
from mmformer.tokens import LATENT, merge, to_padded
from mmformer.visibility import Visibility
from tests.helpers import packed_tokens, scramble

ATTENTION = partial(Attention, num_heads=4, num_kv_heads=2, rotary=Rotary)
LAYERS = {
    "pre-norm": partial(Block, attention=ATTENTION),
    "post-norm": partial(Block, attention=ATTENTION, post_norm=True),
    "rms-gated": partial(Block, attention=ATTENTION, norm=nn.RMSNorm, feedforward=partial(FeedForward, gated=True)),
    "other values": partial(Block, attention=partial(Attention, num_heads=4, num_kv_heads=2, head_dim=[3, 5])),
    "crossing, other values": partial(
        Block, attention=ATTENTION, cross=partial(CrossAttention, num_heads=2, context_dim=12, head_dim=[7, 4])
    ),
    "looped": partial(Looped, layers=[partial(Block, attention=ATTENTION)] * 2, times=3),
    "crossing": partial(Block, attention=ATTENTION, cross=partial(CrossAttention, num_heads=2, context_dim=12)),
}


def transformer(layer, depth=2, **options):
    return scramble(Transformer(16, depth, [layer], **options))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_is_padded(name, causal):
    model = transformer(LAYERS[name], visibility=Visibility(causal=causal))
    tokens = merge([packed_tokens({0: 5, 2: 2, 1: 7}, 3, 16)])
    context = packed_tokens({1: 3, 0: 2}, 3, 12) if name.startswith("crossing") else None
    out = to_padded(model(tokens, context))
    padded = model(to_padded(tokens), to_padded(context) if context else None)
    torch.testing.assert_close(out.x[out.valid], padded.x[padded.valid], rtol=1e-5, atol=1e-5)


def test_causal_has_no_gradient_to_the_future():
    model = transformer(LAYERS["pre-norm"], visibility=Visibility(causal=True))
    tokens = packed_tokens({0: 6}, 1, 16)
    x = tokens.x.clone().requires_grad_()
    out = model(tokens.with_x(x)).x
    for t in range(6):
        (gradient,) = torch.autograd.grad(out[0, t].sum(), x, retain_graph=True)
        assert gradient[0, t + 1 :].abs().sum() == 0
        assert (gradient[0, : t + 1].abs().sum(-1) > 0).all()


def test_a_sample_does_not_feel_its_neighbours():
    model = transformer(LAYERS["pre-norm"])
    alone = packed_tokens({0: 5}, 1, 16, seed=1)
    crowd = merge([packed_tokens({1: 9, 2: 3}, 3, 16, seed=2), packed_tokens({0: 5}, 3, 16, seed=1)])
    mine = model(crowd).x[0][crowd.sample()[0] == 0]
    torch.testing.assert_close(mine, model(alone).x[0], rtol=1e-5, atol=1e-6)


def test_repeating_a_layer_shares_its_weights_and_equals_applying_it_twice():
    shared = transformer(LAYERS["pre-norm"], depth=1, repeat=2, norm=None)
    once = transformer(LAYERS["pre-norm"], depth=1, norm=None)
    once.load_state_dict(shared.state_dict())
    tokens = packed_tokens({0: 4, 1: 2}, 2, 16)
    assert torch.equal(shared(tokens).x, once(once(tokens)).x)


def test_a_loop_goes_through_all_its_layers_again_and_again():
    block = partial(Block, attention=ATTENTION)
    looped = transformer(partial(Looped, layers=[block, block], times=2), depth=1, norm=None)
    once = transformer(block, norm=None)
    once.load_state_dict({name.replace("layers.0.layers", "layers"): t for name, t in looped.state_dict().items()})
    tokens = packed_tokens({0: 4, 1: 2}, 2, 16)
    assert torch.equal(looped(tokens).x, once(once(tokens)).x)


def test_layers_of_a_pattern_alternate_and_start_different():
    local = partial(Block, attention=partial(Attention, num_heads=2, visibility=Visibility(window=1)))
    wide = partial(Block, attention=partial(Attention, num_heads=2))
    model = Transformer(16, 3, [local, local, wide])
    windows = [layer.attention.visibility for layer in model.layers]
    assert windows == [Visibility(window=1), Visibility(window=1), None]
    assert not torch.equal(model.layers[0].attention.qkv.weight, model.layers[1].attention.qkv.weight)


def test_cross_attention_can_be_kept_to_some_modalities():
    layer = Block(16, cross=partial(CrossAttention, num_heads=2, context_dim=12), cross_for=[LATENT], feedforward=None)
    model = scramble(Transformer(16, 0, []))
    model.layers.append(scramble(layer))
    model.norm = nn.Identity()
    latents, text = packed_tokens({0: 2, 1: 2}, 2, 16, LATENT), packed_tokens({0: 3, 1: 1}, 2, 16, seed=4)
    tokens = merge([latents, text])
    change = (model(tokens, packed_tokens({0: 3, 1: 2}, 2, 12)).x - tokens.x).abs().sum(-1)
    assert torch.equal(change > 0, tokens.modality == latents.modality[0, 0])


def test_attention_is_torch_s_own_multi_head_attention():
    ours = scramble(Attention(16, 4))
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    tokens = packed_tokens({0: 5}, 1, 16)
    from mmformer.visibility import Sights

    expected = theirs(tokens.x, tokens.x, tokens.x, need_weights=False)[0]
    torch.testing.assert_close(ours(tokens, None, Sights(tokens, tokens)), expected, rtol=1e-5, atol=1e-5)


def test_errors_name_the_numbers():
    with pytest.raises(ValueError, match="10 channels, 4 heads"):
        Attention(10, 4)
    with pytest.raises(ValueError, match="depth 2 but no layers"):
        Transformer(8, 2, [])
    crossing = transformer(LAYERS["crossing"])
    with pytest.raises(ValueError, match="needs a context"):
        crossing(packed_tokens({0: 2}, 1, 16))
