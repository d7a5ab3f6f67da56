"""Flamingo: the resampler and the gated layers against Idefics of transformers, and what a text sees of its media."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from mmformer.fusion import Fusion
from mmformer.nn import (
    Attention,
    Block,
    ByModality,
    Conditioned,
    CrossAttention,
    FeedForward,
    Gated,
    JointNorm,
    Resampler,
    Rotary,
    Transformer,
)
from mmformer.nn.media import ALWAYS, in_time
from mmformer.pooling import LastPool
from mmformer.tokens import LATENT, Tokens, to_padded
from mmformer.visibility import Sights, Visibility
from tests.helpers import packed_tokens, scramble

DIM = 12
PLAIN = partial(FeedForward, bias=False)
LATEST = partial(CrossAttention, num_heads=2, context_dim=8, bias=False, visibility=Visibility(current=True))


def at(tokens: Tokens, *places: int) -> Tokens:
    assert tokens.layout is not None
    return replace(tokens, layout=replace(tokens.layout, places=places))


def items(samples: list[int], lengths: list[int], places: list[int], modality: str, dim: int, seed: int = 0) -> Tokens:
    """Packed items, of which a sample may have several."""
    made = packed_tokens(dict(enumerate(lengths)), len(lengths), dim, modality, seed)
    assert made.layout is not None
    return replace(made, layout=replace(made.layout, samples=tuple(samples), num_samples=3, places=tuple(places)))


def texts() -> Tokens:
    """Sample 0: text, picture, text, sound, text. Sample 1: picture, text. Sample 2: text alone."""
    return items([0, 0, 0, 1, 2], [2, 3, 1, 4, 2], [0, 2, 4, 1, 0], "text", DIM)


def pictures(seed: int = 1) -> Tokens:
    return items([0, 1], [2, 3], [1, 0], "image", 8, seed)


def sounds(seed: int = 2) -> Tokens:
    return items([0], [2], [3], "audio", 8, seed)


def resampler(depth: int = 2, num_latents: int = 3) -> Resampler:
    norm = partial(ByModality, part=nn.LayerNorm, modalities=[LATENT])
    looking = partial(JointNorm, part=partial(CrossAttention, num_heads=2, bias=False), norm=norm)
    layer = partial(
        Block, cross=looking, feedforward=partial(PLAIN, activation=nn.ReLU),
        norm={"cross": nn.Identity, "feedforward": nn.LayerNorm},
    )  # fmt: skip
    return scramble(Resampler(DIM, num_latents, depth, [layer]))


def language(gates: float | None, depth: int = 3) -> Fusion:
    """A causal language model of rotary layers; with gates, each but the second looks at media first."""
    own = {"attention": partial(Attention, num_heads=3, rotary=Rotary)}
    looking = partial(Block, cross=partial(Gated, part=LATEST), feedforward=partial(Gated, part=PLAIN))
    layers = [partial(Block, **own)]
    if gates is not None:
        layers = [partial(Conditioned, before=looking, **own), *layers]
    enters = {name: nn.Identity() for name in ("text", "image", "audio")}
    mixer = Transformer(DIM, depth, layers, visibility=Visibility(causal=True))
    context = [] if gates is None else ["image", "audio"]
    model = scramble(Fusion(DIM, ["text"], mixer, LastPool(), context=context, entrances=enters, sequential=True), 5)
    for part in model.modules():
        if isinstance(part, Gated):
            nn.init.constant_(part.gate, gates or 0.0)
    return model


@pytest.mark.parametrize("padded", [False, True])
def test_the_resampler_is_that_of_idefics(padded):
    idefics = pytest.importorskip("transformers.models.idefics", reason="transformers is the oracle")
    config = idefics.IdeficsConfig(
        perceiver_config={"qk_layer_norms_perceiver": False}, vision_config={"embed_dim": DIM}
    )
    perceiver = pytest.importorskip("transformers.models.idefics.perceiver", reason="transformers is the oracle")
    theirs = scramble(perceiver.IdeficsPerceiverResampler(config, DIM, 2, 2, DIM // 2, 3))
    ours = resampler()
    with torch.no_grad():
        ours.latents.copy_(theirs.latents)
        ours.norm.load_state_dict(theirs.layer_norm.state_dict())
        for mine, (attention, mlp) in zip(ours.layers, theirs.blocks, strict=True):
            mine.cross.norm.parts[LATENT].load_state_dict(attention.latents_layer_norm.state_dict())
            mine.cross.norm.parts["others"].load_state_dict(attention.context_layer_norm.state_dict())
            mine.cross.part.query.weight.copy_(attention.q_proj.weight)
            mine.cross.part.key_value.weight.copy_(torch.cat([attention.k_proj.weight, attention.v_proj.weight]))
            mine.cross.part.out.weight.copy_(attention.output_proj.weight)
            mine.feedforward_norm.load_state_dict(mlp.ln.state_dict())
            mine.feedforward.up.weight.copy_(mlp.fc.weight)
            mine.feedforward.down.weight.copy_(mlp.c_proj.weight)
    tokens = packed_tokens({2: 5, 0: 1, 1: 4}, 3, DIM, "image")
    media = {2: tokens.x[:, :5], 0: tokens.x[:, 5:6], 1: tokens.x[:, 6:]}
    out = ours(to_padded(tokens) if padded else tokens)
    order = range(3) if padded else (2, 0, 1)
    expected = torch.cat([theirs(media[i]) for i in order])
    torch.testing.assert_close(out.x.reshape(3, 3, DIM), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(3, 3, DIM)
    (out.x.reshape(3, 3, DIM) * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.latents.grad, theirs.latents.grad, rtol=1e-4, atol=1e-4)
    mine, other = ours.layers[0].cross.part.query.weight, theirs.blocks[0][0].q_proj.weight
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_each_item_is_resampled_by_itself_and_keeps_its_sample_and_place():
    tokens = items([1, 0, 0], [2, 4, 5], [3, 1, 2], "image", DIM)
    model = resampler()
    out = model(tokens)
    assert out.layout == replace(tokens.layout, lengths=(3, 3, 3))
    assert torch.equal(out.modality, tokens.modality[:, :9])
    alone = model(packed_tokens({0: 4}, 1, DIM, "image").with_x(tokens.x[:, 2:6]))
    torch.testing.assert_close(out.x[:, 3:6], alone.x, rtol=1e-5, atol=1e-5)


def test_a_gated_layer_is_that_of_idefics():
    idefics = pytest.importorskip("transformers.models.idefics.modeling_idefics", reason="transformers is the oracle")
    config = idefics.IdeficsConfig(
        hidden_size=DIM, num_attention_heads=2, intermediate_size=20, alpha_type="float", dropout=0.0,
        vision_config={"embed_dim": 8}, attn_implementation="eager",
    )  # fmt: skip
    theirs = scramble(idefics.IdeficsGatedCrossAttentionLayer(config, 0)).eval()
    gated_map = partial(FeedForward, expansion=20 / DIM, activation=nn.SiLU, gated=True, bias=False)
    ours = Block(
        DIM, cross=partial(Gated, part=LATEST), feedforward=partial(Gated, part=gated_map),
        norm=partial(nn.RMSNorm, eps=config.rms_norm_eps),
    )  # fmt: skip
    attention, mlp = theirs.cross_attn, theirs.mlp
    with torch.no_grad():
        ours.cross_norm.weight.copy_(theirs.input_layernorm.weight)
        ours.feedforward_norm.weight.copy_(theirs.post_attention_layernorm.weight)
        ours.cross.gate.copy_(theirs.alpha_cross_attn)
        ours.feedforward.gate.copy_(theirs.alpha_dense)
        ours.cross.part.query.weight.copy_(attention.q_proj.weight)
        ours.cross.part.key_value.weight.copy_(torch.cat([attention.k_proj.weight, attention.v_proj.weight]))
        ours.cross.part.out.weight.copy_(attention.o_proj.weight)
        ours.feedforward.part.up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        ours.feedforward.part.down.weight.copy_(mlp.down_proj.weight)
    read = packed_tokens(
        {0: 2, 1: 3}, 2, DIM
    )  # the first text stands before its picture: the last of sample 1 sees two
    read = replace(read, layout=replace(read.layout, samples=(0, 0), num_samples=1, places=(0, 2)))
    seen = packed_tokens({0: 4}, 1, 8, "image", 1)
    seen = at(seen, 1)
    (seen,) = in_time([seen], [read])
    ticks = read.position.clone()
    ticks[0, :, 0] = torch.arange(5)
    read = replace(read, position=ticks)
    out = ours(read, seen, Sights(read, read), Sights(read, seen)).x
    gate = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]])
    blind = torch.zeros(1, 1, 5, 4).masked_fill(gate[:, None, :, None] == 0, torch.finfo(torch.float32).min)
    expected = theirs(read.x, image_hidden_states=seen.x, image_attention_mask=blind, cross_attention_gate=gate)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_media_hold_from_the_text_behind_them_until_the_next_at_another_place():
    image, audio = in_time([pictures(), sounds()], [texts()])
    assert image.position[0, :, :2].tolist() == [[2, 5]] * 2 + [[0, ALWAYS]] * 3
    assert audio.position[0, :, :2].tolist() == [[5, ALWAYS]] * 2
    together = in_time([at(pictures(), 1, 0), at(sounds(), 1)], [texts()])
    assert together[0].position[0, 0].tolist() == together[1].position[0, 0].tolist() == [2, ALWAYS, 0]
    without = in_time([at(pictures()), at(sounds())], [at(texts())])
    assert all((t.position[0] == torch.tensor([0, ALWAYS, 0])).all() for t in without)
    (padded,) = in_time([to_padded(pictures())], [to_padded(texts())])
    assert (padded.position == torch.tensor([0, ALWAYS, 0])).all()


def read_by_sample(out: Tokens) -> list[torch.Tensor]:
    return [out.x[0][out.sample()[0] == i] for i in range(3)]


def test_a_text_sees_the_medium_in_front_of_it_alone():
    """Sample 0: two tokens see nothing, three the picture, one the sound, also what those before it have seen."""
    model = language(0.7, depth=1)
    given = {"text": texts(), "image": pictures(), "audio": sounds()}
    out = read_by_sample(model(given, 3))
    other_picture = read_by_sample(model(given | {"image": pictures(7)}, 3))
    other_sound = read_by_sample(model(given | {"audio": sounds(7)}, 3))
    blind = read_by_sample(model({"text": texts()}, 3))

    def changed(other: list[torch.Tensor], sample: int) -> list[bool]:
        return (out[sample] != other[sample]).any(-1).tolist()

    assert changed(other_picture, 0) == [False, False, True, True, True, True]  # the last through self-attention
    assert changed(other_sound, 0) == [False] * 5 + [True]
    assert changed(other_picture, 1) == [True] * 4
    assert not any(changed(other_picture, 2) + changed(other_sound, 1))
    layer = model.transformer.layers[0]
    nothing_seen = Block(DIM, feedforward=partial(Gated, part=PLAIN))
    nothing_seen.load_state_dict({k: v for k, v in layer.before.state_dict().items() if not k.startswith("cross")})
    fed = texts().x[:, :2]
    fed = fed + nothing_seen.feedforward(nothing_seen.feedforward_norm(fed))
    alone = packed_tokens({0: 2}, 1, DIM).with_x(fed)
    expected = model.transformer.norm(super(Conditioned, layer).forward(
        alone, None, Sights(alone, alone, Visibility(causal=True)), None).x)  # fmt: skip
    torch.testing.assert_close(out[0][:2], expected[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(blind[1], out[1])


def test_gates_at_zero_leave_the_language_model_as_it_was_to_the_bit():
    with_gates, without = language(0.0), language(None)
    missing, extra = with_gates.load_state_dict(without.state_dict(), strict=False)
    assert not extra
    assert all(".before." in name for name in missing)
    given = {"text": texts(), "image": pictures(), "audio": sounds()}
    assert torch.equal(with_gates(given, 3).x, without({"text": texts()}, 3).x)
    assert not torch.equal(language(0.3)(given, 3).x, without({"text": texts()}, 3).x)


def test_the_gates_learn_from_the_start():
    model = language(0.0)
    model({"text": texts(), "image": pictures(), "audio": sounds()}, 3).x.square().sum().backward()
    before = model.transformer.layers[0].before
    assert before.cross.gate.grad.abs() > 0
    assert before.feedforward.gate.grad.abs() > 0


def test_packed_is_padded_where_media_stand_in_front():
    model = language(0.7)
    image = {i: n for i, n in ((1, 2), (0, 4))}
    given = {"text": packed_tokens({0: 3, 2: 2, 1: 5}, 3, DIM), "image": packed_tokens(image, 3, 8, "image", 1)}
    out = to_padded(model(given, 3))
    padded = model({name: to_padded(t) for name, t in given.items()}, 3)
    torch.testing.assert_close(out.x[out.valid], padded.x[padded.valid], rtol=1e-5, atol=1e-5)


def test_half_precision_is_close():
    model, given = language(0.7), {"text": texts(), "image": pictures(), "audio": sounds()}
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(given, 3).x
    torch.testing.assert_close(rough.float(), model(given, 3).x, rtol=0.1, atol=0.15)
