import pytest
import torch
from torch import nn

from mmformer.batch import Ragged
from mmformer.encoders import WaveformEmbedder, mel_convolutions, mel_patches
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


def test_a_waveform_is_convolved_as_torch_does():
    embedder = scramble(WaveformEmbedder(8, [(4, 10, 5), (6, 3, 2)]))
    clips = [torch.randn(n) for n in (200, 57, 200)]
    tokens = each_alone_equals_together(embedder, clips, 0)
    x = clips[1][None, None]
    for convolution, norm in zip(embedder.convolutions, embedder.norms, strict=True):
        x = nn.functional.gelu(norm(convolution(x).transpose(1, 2))).transpose(1, 2)
    expected = embedder.linear(x.transpose(1, 2)[0])
    torch.testing.assert_close(tokens.x[0][tokens.sample()[0] == 1], expected, rtol=1e-5, atol=1e-5)
    assert embedder.num_tokens(57) == len(expected)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="12 x 10 does not divide into patches of 8 x 10"):
        mel_patches(16, 10, 8)(Ragged.stack([torch.randn(12, 10)], [0], 1), 1)
    with pytest.raises(ValueError, match="waveform of 6 samples is shorter"):
        WaveformEmbedder(8, [(4, 10, 5)])(Ragged.stack([torch.randn(6)], [0]), 1)
