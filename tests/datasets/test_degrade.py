"""What degradations do to any picture, text and recording: by the row alone, and more with more strength."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor

from mmformer.datasets.degrade import (
    babble,
    blur,
    clipping,
    crop,
    drop_words,
    jpeg,
    pixel_noise,
    standard,
    typos,
    white_noise,
)

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
IDS = st.text(max_size=8)


def picture(seed: int = 0, height: int = 24, width: int = 31, channels: int = 3) -> Tensor:
    """Smooth shapes: noise would be as noisy behind a blur."""
    torch.manual_seed(seed)
    coarse = torch.randint(0, 256, (1, channels, 5, 6)).float()
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return fine[0].permute(1, 2, 0).to(torch.uint8).contiguous()


def wave(seed: int = 0, samples: int = 4000) -> Tensor:
    torch.manual_seed(seed)
    return torch.sin(torch.arange(samples) * (0.05 + 0.02 * seed)) * torch.rand(1) + 0.01 * torch.randn(samples)


RECORDINGS = {f"r{i}": wave(i, 3000 + 700 * i) for i in range(6)}
VALUES = {"image": picture(), "text": "a brown dog runs across the green grass " * 4, "audio": wave()}
ALL = standard(RECORDINGS)


def distance(degradation, strength: float, id: str = "r0") -> float:
    """How far the value is from what it was: squared differences, or letters and words that are no longer there."""
    value = VALUES[degradation.modality]
    new = degradation.apply(value, strength, id)
    if isinstance(value, str):
        return sum(a != b for a, b in zip(value.split(" "), new.split(" "), strict=False)) + abs(len(value) - len(new))
    return (new.float() - value.float()).square().mean().item()


@pytest.mark.parametrize("degradation", ALL, ids=lambda d: d.name)
def test_more_strength_does_more_harm(degradation) -> None:
    harm = [distance(degradation, strength) for strength in degradation.strengths]
    if degradation.name != "crop":  # what lies under a pixel moves, and may come back
        assert harm == sorted(harm)
    assert harm[-1] > 2 * harm[0]


@pytest.mark.parametrize("degradation", ALL, ids=lambda d: d.name)
def test_the_row_alone_decides(degradation) -> None:
    value, strength = VALUES[degradation.modality], degradation.strengths[-1]
    kept = value.clone() if isinstance(value, Tensor) else value

    def same(a: Tensor | str, b: Tensor | str) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    first = degradation.apply(value, strength, "r0")
    torch.manual_seed(99)
    assert same(first, degradation.apply(value, strength, "r0"))
    assert same(value, kept), "it changed what it was given"
    assert type(first) is type(value)
    if isinstance(value, Tensor):
        assert (first.shape, first.dtype) == (value.shape, value.dtype)
    if degradation.name not in ("blur", "jpeg", "clipping"):
        assert not same(first, degradation.apply(value, strength, "r1"))


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_at_no_strength(channels: int) -> None:
    value = picture(channels=channels)
    assert torch.equal(blur(value, 0.0), value)
    assert torch.equal(crop(value, 1.0, "a"), value)
    assert torch.equal(pixel_noise(value, 0.0, "a"), value)
    assert jpeg(value, 10.0).shape == value.shape
    assert crop(value, 1e-9, "a").unique(dim=0).shape[0] == 1, "a single pixel is brought to the whole size"


def test_blur_is_a_gaussian_filter() -> None:
    value = picture()
    wanted = gaussian_filter(value.float().numpy(), (1.5, 1.5, 0), mode="nearest", radius=5)
    assert (blur(value, 1.5).float() - torch.from_numpy(wanted)).abs().max() <= 0.51


def test_pixel_noise_has_its_deviation() -> None:
    grey = torch.full((64, 64, 3), 128, dtype=torch.uint8)
    noise = (pixel_noise(grey, 0.1, "a").float() - 128) / 255
    assert noise.std().item() == pytest.approx(0.1, rel=0.03)
    assert noise.mean().item() == pytest.approx(0, abs=0.005)


@given(TEXTS, IDS, st.floats(0, 1))
def test_typos_of_any_text(text: str, id: str, rate: float) -> None:
    assert typos(text, 0.0, id) == text
    new = typos(text, rate, id)
    assert set(new) <= set(text)
    assert bool(new.strip()) == bool(text.strip())
    assert len(new) <= 2 * len(text)


def test_typos_hit_their_share() -> None:
    changed = sum(typos("brown", 0.1, f"{i}") != "brown" for i in range(1000)) / 1000
    assert 1 - 0.9**5 - 0.07 < changed < 1 - 0.9**5 + 0.03  # a letter may be replaced by the same one


@given(TEXTS, IDS, st.floats(0, 1), st.floats(0, 1))
def test_a_higher_rate_drops_more_of_the_same_words(text: str, id: str, one: float, other: float) -> None:
    low, high = sorted([one, other])
    words, fewer, least = text.split(), drop_words(text, low, id).split(), drop_words(text, high, id).split()
    assert drop_words(text, 0.0, id).split() == words
    assert is_part(fewer, words)
    assert is_part(least, fewer)
    assert bool(least) == bool(words)


def is_part(some: list[str], every: list[str]) -> bool:
    left = iter(every)
    return all(word in left for word in some)


@given(st.integers(1, 300), st.floats(-20, 40), IDS)
def test_noise_has_its_ratio(samples: int, decibel: float, id: str) -> None:
    value = wave(1, samples)
    for noisy in (white_noise(value, decibel, id), babble(value, decibel, id, RECORDINGS)):
        noise = noisy.double() - value.double()
        if value.abs().max() > 1e-3 and noise.abs().max() > 1e-4:
            ratio = 10 * torch.log10(value.double().square().mean() / noise.square().mean())
            assert ratio.item() == pytest.approx(decibel, abs=0.1)


def test_silence_stays_silent_and_nobody_babbles_over_himself() -> None:
    assert not white_noise(torch.zeros(50), 0.0, "a").any()
    assert not babble(torch.zeros(50), 0.0, "a", RECORDINGS).any()
    two = {"r0": RECORDINGS["r0"], "r1": torch.ones(10)}
    noise = babble(RECORDINGS["r0"], 0.0, "r0", two) - RECORDINGS["r0"]
    torch.testing.assert_close(noise, noise[:1].expand_as(noise), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="babble for row 'r0' needs the recording of another row"):
        babble(RECORDINGS["r0"], 0.0, "r0", {"r0": RECORDINGS["r0"], "r1": torch.zeros(9)})
    assert "babble" not in {degradation.name for degradation in standard({"r0": RECORDINGS["r0"]})}


@given(st.floats(0, 1))
def test_clipping_keeps_what_is_below(share: float) -> None:
    value = wave(2, 200)
    clipped, limit = clipping(value, share), share * value.abs().max()
    assert (clipped.abs() <= limit * (1 + 1e-6)).all()
    assert torch.equal(clipped[value.abs() < limit], value[value.abs() < limit])
