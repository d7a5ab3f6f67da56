from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchaudio.transforms import MelSpectrogram

from mmformer.datasets.features import Feature, Waveform
from mmformer.datasets.mels import ClapMel, KaldiMel, WhisperMel

NOISE = torch.randn(24_000, generator=torch.Generator().manual_seed(0)) * torch.linspace(1e-4, 1, 24_000)
AST_MEAN, AST_STD = -4.2677393, 4.5689974


def whisper_by_hand(waveform: torch.Tensor, mels: int) -> torch.Tensor:
    power = MelSpectrogram(16000, 400, hop_length=160, n_mels=mels, f_max=8000, norm="slaney", mel_scale="slaney")
    logarithm = power(waveform)[:, :-1].clamp(min=1e-10).log10()
    return ((torch.maximum(logarithm, logarithm.max() - 8) + 4) / 4).T


@pytest.mark.parametrize(("mels", "seconds", "length"), [(80, 2.0, 24_000), (128, 1.0, 24_000), (80, None, 23_999)])
def test_whisper_is_that_of_torchaudio_and_of_transformers(mels, seconds, length) -> None:
    waveform = NOISE[:length]
    found = WhisperMel(Waveform(16000), mels, seconds)(waveform)
    fitted = waveform if seconds is None else torch.nn.functional.pad(waveform, (0, 16_000))[: int(seconds * 16000)]
    # The filters of torchaudio are made in single precision.
    torch.testing.assert_close(found, whisper_by_hand(fitted, mels), atol=3e-5, rtol=0)

    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    extractor = transformers.WhisperFeatureExtractor(feature_size=mels, chunk_length=int(seconds or 30))
    padding = "do_not_pad" if seconds is None else "max_length"
    expected = extractor(waveform.numpy(), sampling_rate=16000, padding=padding, return_tensors="pt")
    torch.testing.assert_close(found, expected["input_features"][0].T, atol=1e-5, rtol=0)


def kaldi_by_hand(waveform: np.ndarray, num_mels: int) -> np.ndarray:
    """Kaldi's filter bank in double precision: frames of 25 ms without their mean, pre-emphasis, Hann, HTK's mels."""
    frames = np.stack([waveform[i : i + 400] for i in range(0, len(waveform) - 399, 160)]).astype(np.float64)
    frames -= frames.mean(axis=1, keepdims=True)
    frames -= 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft(frames * np.hanning(400), 512)) ** 2

    def mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    edges = np.linspace(mel(20), mel(8000), num_mels + 2)[:, None]
    place = mel(np.arange(257) * 16000 / 512)
    up = (place - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - place) / (edges[2:] - edges[1:-1])
    return np.log(np.maximum(power @ np.maximum(0, np.minimum(up, down)).T, np.finfo(np.float32).eps))


@pytest.mark.parametrize("frames", [200, 100])
def test_kaldi_is_that_of_a_derivation_and_of_transformers(frames) -> None:
    found = KaldiMel(Waveform(16000), 128, frames)(NOISE)
    by_hand = kaldi_by_hand(NOISE.numpy(), 128)[:frames]
    np.testing.assert_allclose(found[: len(by_hand)], by_hand, atol=5e-3)
    np.testing.assert_allclose(KaldiMel(Waveform(16000), 128, None)(NOISE)[: len(by_hand)], found[: len(by_hand)])
    assert not found[len(by_hand) :].any()

    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    extractor = transformers.ASTFeatureExtractor(max_length=frames, mean=AST_MEAN, std=AST_STD)
    expected = extractor(NOISE.numpy(), sampling_rate=16000, return_tensors="pt")["input_values"][0]
    torch.testing.assert_close((found - AST_MEAN) / (2 * AST_STD), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [2_000, 20_000, 24_000])
def test_clap_is_that_of_transformers(length) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    extractor = transformers.ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc", max_length_s=0.5)
    extractor.nb_max_samples = 24_000
    expected = extractor(NOISE[:length].numpy(), sampling_rate=48000, return_tensors="pt")["input_features"][0, 0]
    torch.testing.assert_close(ClapMel(Waveform(48000), 64, 0.5)(NOISE[:length]), expected, atol=1e-3, rtol=0)


@given(
    st.integers(1, 3000),
    st.sampled_from(
        [
            WhisperMel(Waveform(16000), 80, None),
            WhisperMel(Waveform(16000), 80, 0.1),
            KaldiMel(Waveform(16000), 64, None),
            KaldiMel(Waveform(16000), 64, 7),
            ClapMel(Waveform(48000), 64, 0.04),
        ]
    ),
)
def test_the_shape_of_any_length_is_foretold(length, feature: Feature) -> None:
    item = feature(NOISE[:length])
    assert tuple(item.shape[:1]) == feature.shape(NOISE[:length])
    assert torch.isfinite(item).all()
    assert item.is_contiguous()
    assert feature.tokens(feature.shape(NOISE[:length])) >= 0
