import pytest
import torch
from torch import nn

from mmformer.batch import Ragged
from mmformer.encoders import mel_convolutions, mel_frames, mel_patches, waveform_convolutions
from mmformer.nn import Sinusoid
from tests.helpers import scramble


def each_alone_equals_together(embedder, items, feature_dims):
    together = embedder(Ragged.stack(items, range(len(items)), feature_dims), len(items))
    for row, item in enumerate(items):
        alone = embedder(Ragged.stack([item], [0], feature_dims), 1)
        mine = together.sample()[0] == row
        torch.testing.assert_close(together.x[0][mine], alone.x[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(together.position[0][mine], alone.position[0])
    return together


def test_clips_of_any_length_are_patches_in_time_order():
    clips = [torch.randn(8 * n, 10) for n in (3, 1, 5, 3)]
    tokens = each_alone_equals_together(scramble(mel_patches(16, 10, 8, Sinusoid, mels=5)), clips, 1)
    longest = tokens.sample()[0] == 2
    assert tokens.position[0][longest].tolist() == [[t, 0, m] for t in range(5) for m in range(2)]


def test_a_convolution_stem_gives_a_token_for_each_four_frames():
    clips = [torch.randn(n, 10) for n in (12, 5, 12, 21)]
    tokens = each_alone_equals_together(scramble(mel_convolutions(16, 10, [4, 6], Sinusoid)), clips, 1)
    assert tokens.layout.lengths == (2, 3, 3, 6)


def every(layer, x):
    """Channel norms by their definition: (items, channels, time) with the channels last."""
    return layer(x) if isinstance(layer, nn.GroupNorm | nn.Identity) else nn.functional.layer_norm(
        x.mT, layer.normalized_shape, layer.weight, layer.bias, layer.eps
    ).mT  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "time_norm": True, "norm": nn.LayerNorm, "activation": nn.SiLU}, {"norm": nn.RMSNorm}],
)
def test_a_waveform_is_convolved_as_torch_does(options):
    embedder = scramble(waveform_convolutions(8, [(4, 10, 5), (6, 3, 2)], **options))
    clips = [torch.randn(n) for n in (200, 57, 200, 20)]
    tokens = each_alone_equals_together(embedder, clips, 0)
    stem, x = embedder.stem, clips[1][None, None]
    for convolution, norm in zip(stem.convolutions, stem.norms, strict=True):
        x = stem.activation(every(norm, convolution(x)))
    expected = stem.linear(stem.norm(x.mT))[0]
    torch.testing.assert_close(tokens.x[0][tokens.sample()[0] == 1], expected, rtol=1e-5, atol=1e-5)
    assert stem.num_tokens(57) == len(expected)
    assert (stem.num_tokens(stem.reach - 1), stem.num_tokens(stem.reach)) == (0, 1)


def test_one_norm_over_time_belongs_to_the_first_convolution():
    norms = waveform_convolutions(8, [(4, 10, 5), (6, 3, 2), (7, 2, 2)], time_norm=True).stem.norms
    assert [type(norm) for norm in norms] == [nn.GroupNorm, nn.Identity, nn.Identity]
    assert norms[0].num_groups == norms[0].num_channels == 4


@pytest.mark.parametrize("frames", [1, 2, 7, 12])
def test_two_frames_are_one_token(frames):
    embedder = scramble(mel_frames(8, 10, Sinusoid))
    clips = [torch.randn(n, 10) for n in (12, frames, 5)]
    tokens = each_alone_equals_together(embedder, clips, 1)
    mine = tokens.sample()[0] == 1
    assert mine.sum() == embedder.stem.num_tokens(frames) == (frames + 1) // 2
    padded = nn.functional.pad(clips[1].T, (1, 1))[None]  # zeros beyond both ends
    x = nn.functional.gelu(nn.functional.conv1d(padded, embedder.stem.first.weight, embedder.stem.first.bias))
    x = nn.functional.conv1d(nn.functional.pad(x, (1, 1)), embedder.stem.second.weight, embedder.stem.second.bias)
    expected = nn.functional.gelu(x[..., ::2]).mT[0] + embedder.position(tokens.position[0][mine])
    torch.testing.assert_close(tokens.x[0][mine], expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="12 x 10 does not divide into patches of 8 x 10"):
        mel_patches(16, 10, 8)(Ragged.stack([torch.randn(12, 10)], [0], 1), 1)
    embedder = waveform_convolutions(8, [(4, 10, 5), (4, 3, 2)])
    with pytest.raises(ValueError, match=r"19 values in time is shorter than the 20 .* min_samples to 20"):
        embedder(Ragged.stack([torch.randn(19), torch.randn(90)], [0, 1]), 2)
