"""The features that travel with a file make the items of training."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

from mmformer.datasets import features as training
from mmformer.datasets import resize as steps
from mmformer.datasets.mels import ClapMel, KaldiMel, WhisperMel
from mmformer.datasets.sources import DecodeError
from mmformer.datasets.tokenizers import BPE, ByteTokenizer, WordTokenizer
from mmformer.export.describe import plain
from mmformer.runtime import features, mels
from mmformer.runtime.features import feature_of

RANDOM = np.random.default_rng(0)
WAVE = training.Waveform(16_000, max_seconds=9.0)


def loud(samples: int = 14_000) -> tuple[np.ndarray, int]:
    return RANDOM.normal(0, 0.2, samples).astype(np.float32), 16_000


def travelled(feature) -> features.Feature:
    return feature_of(json.loads(json.dumps(plain(feature))))


@pytest.mark.parametrize("name", ["Text", "Picture", "Waveform", "LogMel", "WhisperMel", "KaldiMel", "ClapMel"])
def test_settings_are_those_of_training(name):
    theirs = {cls.__name__: cls for cls in (WhisperMel, KaldiMel, ClapMel)}.get(name) or getattr(training, name)
    ours = getattr(features, name, None) or getattr(mels, name)
    assert [field.name for field in fields(ours)] == [field.name for field in fields(theirs)]


SOUNDS = [
    WAVE,
    training.Waveform(16_000, 9.0, normalize=True, min_samples=20_000),
    training.LogMel(WAVE, num_mels=40, window=400, hop=160, multiple=8),
    training.LogMel(WAVE, num_mels=32, window=300, hop=110, fft=600, normalize=False),
    training.LogMel(WAVE, num_mels=40, window=400, hop=160, frames=50),
    WhisperMel(WAVE, num_mels=80, seconds=None),
    WhisperMel(WAVE, num_mels=80, seconds=2.0),
    KaldiMel(WAVE, num_mels=64, frames=None),
    KaldiMel(WAVE, num_mels=64, frames=100),
    ClapMel(WAVE, num_mels=64, seconds=2.0, highest=7900.0),
]


@pytest.mark.parametrize("feature", SOUNDS, ids=lambda feature: type(feature).__name__)
@pytest.mark.parametrize("samples", [14_000, 40_001, 500])
@pytest.mark.filterwarnings("ignore:At least one mel filterbank:UserWarning")
def test_sounds(feature, samples):
    value = loud(samples)
    ours, theirs = travelled(feature)(value), feature(value).numpy()
    assert ours.dtype == np.float32
    tolerance = 2e-4 if isinstance(feature, KaldiMel | ClapMel) else 2e-5  # their logarithms have no floor to speak of
    np.testing.assert_allclose(ours, theirs, atol=tolerance)


PICTURES = [
    training.Picture(longest=8, multiple=4, channels=1),
    training.Picture(short=12, longest=24, multiple=4),
    training.Picture(),
    training.Picture(steps=(steps.ShortestSide(20), steps.CentreCrop(16, 16))),
    training.Picture(steps=[steps.Squash(9, 11, filter="bilinear")], multiple=3),
    training.Picture(steps=[steps.CentreCrop(40, 40, even=False, fill=[1, 2, 3]), steps.WholePatches(7)]),
]


@pytest.mark.parametrize("feature", PICTURES, ids=range(len(PICTURES)))
@pytest.mark.parametrize("size", [(31, 23), (8, 8), (90, 40)])
def test_pictures(feature, size):
    picture = Image.fromarray(RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8))
    np.testing.assert_array_equal(travelled(feature)(picture), feature(picture).numpy())


TOKENIZERS = [
    ByteTokenizer(),
    WordTokenizer(("which", "digit", "?")),
    BPE.train(["which digit is it?", "which one?"], 300),
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: type(tokenizer).__name__)
@pytest.mark.parametrize("options", [{}, {"begin": True, "end": True}, {"pad": True}], ids=str)
def test_texts(tokenizer, options):
    feature = training.Text(tokenizer, max_length=12, **options)
    for text in ("Which digit?", "ünknown", "a much longer text than that of the others"):
        np.testing.assert_array_equal(travelled(feature)(text), feature(text).numpy())


def test_what_is_wrong_with_a_text_is_said():
    feature = travelled(training.Text(ByteTokenizer(), max_length=4))
    with pytest.raises(DecodeError, match="the text is empty"):
        feature("")
    with pytest.raises(DecodeError, match="a int, not a text"):
        feature(3)


def test_a_picture_that_would_grow_too_large_is_refused():
    feature = travelled(training.Picture(short=900, max_pixels=1000))
    with pytest.raises(DecodeError, match="10 x 10 pixels would become 900 x 900: more than max_pixels"):
        feature(np.zeros((10, 10, 3), np.uint8))


def test_a_feature_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="wants the feature 'Smell', and this version knows Text, Picture"):
        feature_of({"feature": "Smell"})
