from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchaudio.transforms import MelSpectrogram

from mmformer.datasets.features import LogMel, Picture, Text, Waveform
from mmformer.datasets.resize import CentreCrop, ShortestSide, Squash
from mmformer.datasets.sources import DecodeError
from mmformer.datasets.tokenizers import BOS, EOS, PAD, ByteTokenizer, SpecialIds

NOISE = torch.randn(9000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("rate", "mels", "window", "hop", "fft"), [(8000, 40, 200, 80, None), (16000, 80, 400, 160, 400)]
)
def test_log_mel_is_that_of_torchaudio(rate, mels, window, hop, fft) -> None:
    feature = LogMel(Waveform(rate), mels, window, hop, fft, normalize=False)
    reference = MelSpectrogram(rate, n_fft=fft or 256, win_length=window, hop_length=hop, n_mels=mels)(NOISE).T
    torch.testing.assert_close(feature(NOISE), (reference + 1e-6).log())


@given(st.integers(1, 2000), st.sampled_from([1, 4, 8]), st.none() | st.integers(1, 50))
def test_log_mel_of_any_length_has_the_shape_foretold(length, multiple, frames) -> None:
    feature = LogMel(Waveform(8000), 40, 200, 80, frames=frames, multiple=multiple)
    item = feature(NOISE[:length])
    assert item.shape == (*feature.shape(NOISE[:length]), 40)
    assert torch.isfinite(item).all()
    if frames is None:
        assert len(item) % multiple == 0
        assert feature.tokens(tuple(item.shape[:1])) == len(item) // multiple
        assert len(item) >= 1 + max(length, 256) // 80
    else:
        assert len(item) == frames


def test_log_mel_is_normalised_and_stretched() -> None:
    feature = LogMel(Waveform(8000), 40, 200, 80)
    item = feature(NOISE)
    assert abs(float(item.mean())) < 1e-5
    assert abs(float(item.std(correction=0)) - 1) < 1e-3
    louder = feature(NOISE * 3)
    torch.testing.assert_close(item, louder, atol=0.01, rtol=0)
    assert torch.isfinite(feature(torch.zeros(4000))).all()
    fixed = LogMel(Waveform(8000), 40, 200, 80, frames=226, normalize=False)(NOISE)
    free = LogMel(Waveform(8000), 40, 200, 80, normalize=False)(NOISE)
    between = 0.125 * free[:-2] + 0.75 * free[1:-1] + 0.125 * free[2:]
    torch.testing.assert_close(fixed.view(113, 2, 40).mean(1)[1:-1], between)


def picture(height: int, width: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    rows = np.linspace(0, 255, height)[:, None] + np.zeros((1, width))
    Image.fromarray(rows.astype(np.uint8)).save(stream, form)
    return stream.getvalue()


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([{}, {"short": 48}, {"longest": 40}, {"short": 48, "longest": 64}])
    | st.sampled_from([{"steps": [ShortestSide(32), CentreCrop(32, 32)]}, {"steps": [Squash(20, 50)], "short": 32}]),
    st.sampled_from([1, 3]),
    st.sampled_from(["PNG", "JPEG"]),
)
def test_a_picture_of_any_shape_has_the_shape_foretold(height, width, options, channels, form) -> None:
    feature = Picture(**options, multiple=16, channels=channels)
    item = feature(picture(height, width, form))
    assert item.dtype == torch.uint8
    assert tuple(item.shape) == (*feature.shape(picture(height, width, form)), channels)
    assert item.shape[0] % 16 == item.shape[1] % 16 == 0
    assert feature.tokens(tuple(item.shape[:2])) == item.shape[0] // 16 * item.shape[1] // 16
    if len(options.get("steps", [])) == 2:
        assert item.shape[:2] == (32, 32)
    if "longest" in options:
        assert max(item.shape[:2]) <= 64


def test_a_picture_keeps_its_aspect_and_content() -> None:
    assert Picture(short=32, multiple=4).shape(picture(100, 200)) == (32, 64)
    assert Picture(longest=50).shape(picture(100, 200)) == (25, 50)
    assert Picture(longest=500).shape(picture(100, 200)) == (100, 200)
    whole = Picture(channels=1)(picture(64, 40))
    assert whole[:, 0, 0].tolist() == np.linspace(0, 255, 64).astype(np.uint8).tolist()
    middle = Picture(steps=[ShortestSide(40), CentreCrop(40, 40)], channels=1)(picture(80, 40))
    assert middle[:, 0, 0].tolist() == np.linspace(0, 255, 80).astype(np.uint8)[20:60].tolist()


def test_a_large_jpeg_comes_out_like_the_png() -> None:
    feature = Picture(short=32, channels=1)
    difference = feature(picture(900, 600, "JPEG")).float() - feature(picture(900, 600)).float()
    assert difference.abs().max() <= 3


@pytest.mark.parametrize("options", [{"short": 224}, {"steps": [ShortestSide(224), CentreCrop(224, 224)]}])
def test_a_strip_is_not_blown_up(options) -> None:
    with pytest.raises(DecodeError, match=r"1 x 6000 pixels would become 224 x 1344000: more than max_pixels"):
        Picture(**options)(picture(6000, 1))


def test_a_text_begins_and_ends_within_its_length() -> None:
    assert Text(ByteTokenizer(), 99)("ab").tolist() == [102, 103]
    feature = Text(ByteTokenizer(), 4, begin=True, end=True)
    assert feature("abcdef").tolist() == [BOS, 102, 103, EOS]
    assert feature.shape("abcdef") == (4,)
    assert feature.tokens((4,)) == 4
    with pytest.raises(DecodeError, match="no token: the text is empty"):
        feature("")
    with pytest.raises(DecodeError, match="a int, not a text"):
        feature(3)


def test_a_text_is_filled_up_and_its_length_counts() -> None:
    feature = Text(ByteTokenizer(), 6, begin=True, end=True, pad=True)
    assert feature("ab").tolist() == [BOS, 102, 103, EOS, PAD, PAD]
    assert feature("abcdef").tolist() == [BOS, 102, 103, 104, 105, EOS]
    assert feature.tokens(feature.shape("ab")) == 6


def test_a_text_asks_for_no_token_that_its_tokenizer_lacks() -> None:
    class Plain(ByteTokenizer):
        specials = SpecialIds()

    with pytest.raises(ValueError, match="pad=true, but this tokenizer has no token for it"):
        Text(Plain(), 8, pad=True)
    with pytest.raises(ValueError, match="end=true, but"):
        Text(Plain(), 8, end=True)
    with pytest.raises(ValueError, match="max_length 2 leaves no room"):
        Text(ByteTokenizer(), 2, begin=True, end=True)


def test_a_waveform_is_normalised_and_long_enough() -> None:
    item = Waveform(16000, normalize=True, min_samples=400)(NOISE[:300] * 7 + 2)
    assert abs(float(item.mean())) < 1e-6
    assert abs(float(item[:300].var(correction=0)) - 1) < 1e-5
    assert item.shape == Waveform(16000, min_samples=400).shape(NOISE[:300]) == (400,)
    assert not item[300:].any()
