"""Files and arrays become what they become in training."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmformer.datasets import decode as training
from mmformer.datasets.sources import DecodeError
from mmformer.runtime import decode

RANDOM = np.random.default_rng(0)


def picture(mode: str = "RGB", format: str = "PNG", size: tuple[int, int] = (23, 31), **options) -> bytes:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = RANDOM.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode).save(out, format, **options)
    return out.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(format="JPEG", exif=exif)


def deep() -> bytes:
    out = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 65536, (9, 7), dtype=np.uint16)).save(out, "PNG")
    return out.getvalue()


def sound(rate: int, channels: int = 2, format: str = "WAV", count: int = 3000) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, RANDOM.uniform(-0.5, 0.5, (count, channels)), rate, format=format)
    return out.getvalue()


PICTURES = {
    "png": picture(), "grey": picture("L"), "alpha": picture("RGBA"), "jpeg": picture(format="JPEG", size=(90, 70)),
    "webp": picture(format="WEBP"), "16 bits": deep(), **{f"turned {i}": turned(i) for i in range(1, 9)},
    "array": RANDOM.integers(0, 256, (5, 6, 3), dtype=np.uint8), "floats": RANDOM.random((3, 5, 6)),
    "pillow": Image.new("P", (4, 5)),
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("reduce_to", [None, lambda height, width: 20], ids=["whole", "reduced"])
@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_pictures_to_the_bit(name, reduce_to, channels):
    value = PICTURES[name]
    wanted = training.decode_image(value, 10**6, reduce_to, channels).numpy()
    np.testing.assert_array_equal(decode.decode_image(value, 10**6, reduce_to, channels), wanted)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG"])
def test_sounds_to_the_bit(format):
    value = sound(8000, format=format)
    np.testing.assert_array_equal(decode.decode_audio(value, 8000, 9.0), training.decode_audio(value, 8000, 9.0))


@pytest.mark.parametrize("rate", [44_100, 22_050, 11_025, 8000, 6000, 16_001, 48_000])
def test_other_rates_are_resampled_alike(rate):
    value = sound(rate)
    wanted = training.decode_audio(value, 16_000, 9.0).numpy()
    np.testing.assert_allclose(decode.decode_audio(value, 16_000, 9.0), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "array",
    [RANDOM.uniform(-1, 1, 40), (RANDOM.integers(-9, 9, (2, 40), dtype=np.int16), 8000), RANDOM.random((40, 2))],
    ids=["floats", "integers", "channels"],
)
def test_sounds_in_memory(array):
    np.testing.assert_array_equal(decode.decode_audio(array, 8000, 9.0), training.decode_audio(array, 8000, 9.0))


BROKEN = {
    "cut off": picture()[:-20], "empty": b"", "text": b"no picture", "object": 3, "shape": np.zeros((2, 3, 7)),
    "range": np.full((3, 3), 2.0), "missing": "nowhere.png",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_errors_are_those_of_training(name):
    messages = []
    for module in (training, decode):
        with pytest.raises(DecodeError) as found:
            module.decode_image(BROKEN[name], 10**6)
        messages.append(str(found.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "value", [b"RIFF", sound(8000)[:-100], np.full(9, np.nan), np.zeros((2, 0)), sound(100, count=2000)], ids=range(5)
)
def test_errors_of_sounds_are_those_of_training(value):
    messages = []
    for module in (training, decode):
        with pytest.raises(DecodeError) as found:
            module.decode_audio(value, 8000, 9.0)
        messages.append(str(found.value))
    assert messages[0] == messages[1]


def test_a_picture_of_too_many_pixels_is_refused():
    with pytest.raises(DecodeError, match="23 x 31 pixels, more than the limit of 100"):
        decode.decode_image(PICTURES["png"], 100)
