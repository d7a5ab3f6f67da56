"""The state-space mixer is transformers' Mamba-2, and starts anew with each segment."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmformer.nn.statespace import BothWays, Mamba2
from mmformer.tokens import Tokens
from mmformer.visibility import Sights, Visibility
from tests.helpers import packed_tokens, scramble
from tests.nn.mixing import LENGTHS, assert_same_in_all_layouts, flops, gradients, texts

CAUSAL = Visibility(causal=True)
SMALL = partial(Mamba2, state=5, head_dim=4, expand=2.0, groups=2, chunk=8)


def mixer(**options) -> Mamba2:
    return scramble(SMALL(16, **options)).double()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # it says that its kernels are not installed
@pytest.mark.parametrize("length", [3, 8, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_that_of_transformers_forward_and_backward(length: int, dtype: torch.dtype) -> None:
    module = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason="the oracle")
    config = module.Mamba2Config(
        hidden_size=16, state_size=5, head_dim=4, num_heads=8, expand=2, n_groups=2, conv_kernel=4, chunk_size=16,
        num_hidden_layers=1, use_bias=False, use_conv_bias=True, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    ours, theirs = mixer().to(dtype), module.Mamba2Mixer(config, 0).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    tokens = texts({0: length}, 16)
    x = tokens.x[:, :length].to(dtype).requires_grad_()
    alone = Tokens(
        x=x, modality=tokens.modality[:, :length], position=tokens.position[:, :length],
        segment=torch.zeros(1, length, dtype=torch.long),
    )  # fmt: skip
    got, wanted = ours(alone, None, Sights(alone, alone, CAUSAL)), theirs(x)
    tolerance = 1e-5  # theirs computes in single precision
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    mine, others = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == others.keys()
    found = gradients(got, [x, *mine.values()])
    expected = gradients(wanted, [x, *(others[name] for name in mine)])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def slow(layer: Mamba2, x: Tensor) -> Tensor:
    """One segment, one token after the other: the recurrence itself."""
    inner, mixed = layer.norm.weight.shape[0], layer.conv1d.in_channels
    gate, xbc, dt = layer.in_proj(x).split([inner, mixed, layer.heads], -1)
    padded = torch.cat([xbc.new_zeros(layer.width - 1, mixed), xbc])
    windows = torch.stack([padded[i : i + len(x)] for i in range(layer.width)], -1)
    xbc = F.silu((windows * layer.conv1d.weight[:, 0]).sum(-1) + layer.conv1d.bias)
    value, b, c = xbc.split([inner, layer.groups * layer.state, layer.groups * layer.state], -1)
    value, dt = value.view(len(x), layer.heads, -1), F.softplus(dt + layer.dt_bias)
    per_group = layer.heads // layer.groups
    b, c = (part.view(len(x), layer.groups, 1, -1).expand(-1, -1, per_group, -1).flatten(1, 2) for part in (b, c))
    state, out = torch.zeros(layer.heads, value.shape[-1], layer.state).to(x), []
    for t in range(len(x)):
        decay = torch.exp(-layer.A_log.exp() * dt[t])
        state = decay[:, None, None] * state + (dt[t][:, None] * value[t])[..., None] * b[t][:, None]
        out.append((state @ c[t][..., None])[..., 0] + layer.D[:, None] * value[t])
    return layer.out_proj(layer.norm(torch.stack(out).flatten(1), gate))


def test_it_is_its_recurrence_forward_and_backward() -> None:
    layer, tokens = mixer(), texts({0: 45}, 16)
    x = tokens.x.requires_grad_()
    ours, wanted = layer(tokens.with_x(x), None, Sights(tokens, tokens))[0, :45], slow(layer, x[0, :45])
    torch.testing.assert_close(ours, wanted)
    inputs = [x, *layer.parameters()]
    for got, expected in zip(gradients(ours, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(got, expected)
    back = mixer(reverse=True)
    ours = back(tokens, None, Sights(tokens, tokens))[0, :45]
    torch.testing.assert_close(ours, slow(back, tokens.x[0, :45].flip(0)).flip(0))


def test_layouts_agree() -> None:
    tokens = texts(LENGTHS, 16)
    assert_same_in_all_layouts(mixer(), tokens, CAUSAL)
    assert_same_in_all_layouts(scramble(BothWays(16, SMALL)).double(), tokens)


def test_cost_grows_with_the_length() -> None:
    layer = Mamba2(8, 4, head_dim=8)
    assert flops(layer, 16384, 8, CAUSAL) <= 2.01 * flops(layer, 8192, 8, CAUSAL)


def test_it_starts_as_the_paper_says() -> None:
    layer = Mamba2(32, 8, head_dim=8)
    step = F.softplus(layer.dt_bias)
    assert step.min() >= 0.999e-3
    assert step.max() <= 0.1001
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 9.0))


def test_what_it_cannot_do_it_refuses() -> None:
    tokens = packed_tokens({0: 3}, 1, 16)
    with pytest.raises(ValueError, match=r"a state-space mixer cannot honour .*window=2"):
        SMALL(16)(tokens, None, Sights(tokens, tokens, Visibility(window=2)))
    with pytest.raises(ValueError, match="reads backwards sees what is later"):
        BothWays(16, SMALL)(tokens, None, Sights(tokens, tokens, CAUSAL))
    with pytest.raises(ValueError, match="30 channels, heads of 4, 2 groups"):
        SMALL(15)
    with pytest.raises(ValueError, match="chunks of 2 tokens with a convolution over 4"):
        Mamba2(32, 8, chunk=2)
    empty = packed_tokens({}, 3, 16)
    assert SMALL(16)(empty, None, Sights(empty, empty, CAUSAL)).shape == (1, 0, 16)


def test_half_precision_is_near() -> None:
    layer, tokens = mixer(), texts(LENGTHS, 16)
    wanted = layer(tokens, None, Sights(tokens, tokens))
    half = tokens.with_x(tokens.x.bfloat16())
    got = layer.bfloat16()(half, None, Sights(half, half))
    assert (got - wanted).norm() < 0.05 * wanted.norm()
