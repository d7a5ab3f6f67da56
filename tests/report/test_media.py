from __future__ import annotations

import io
from base64 import b64decode

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmformer.report.media import RATE, SECONDS, SIDE, picture, sound, wav
from tests.report.runs import picture_file, sound_file


def content(address: str) -> bytes:
    head, _, data = address.partition(",")
    assert head.startswith("data:")
    assert head.endswith(";base64")
    return b64decode(data)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_picture_of_any_kind_becomes_a_small_png(mode):
    out = io.BytesIO()
    Image.new(mode, (900, 300)).save(out, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
    shown = picture(out.getvalue())
    with Image.open(io.BytesIO(content(shown.address))) as image:
        assert (image.format, image.size) == ("PNG", (SIDE, SIDE // 3))
    assert not shown.small


def test_a_small_picture_keeps_its_pixels():
    data = picture_file(3)
    shown = picture(data)
    assert shown.small
    with Image.open(io.BytesIO(content(shown.address))) as image, Image.open(io.BytesIO(data)) as wanted:
        assert np.array_equal(np.asarray(image), np.asarray(wanted.convert("RGB")))


def test_a_picture_is_turned_as_its_camera_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (60, 20)).save(out, "JPEG", exif=exif)
    with Image.open(io.BytesIO(content(picture(out.getvalue()).address))) as image:
        assert image.size == (20, 60)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
def test_a_sound_of_any_kind_becomes_a_short_wav_of_the_same_pitch(rate, form):
    time = np.arange(rate * (SECONDS + 1)) / rate
    out = io.BytesIO()
    # One block a write: libsndfile's Vorbis encoder cannot take much more at once.
    with soundfile.SoundFile(out, "w", rate, 2, format=form) as file:
        for part in np.array_split(np.stack([np.sin(2 * np.pi * 440 * time) / 2] * 2, 1), 50):
            file.write(part)
    samples, found = soundfile.read(io.BytesIO(content(sound(out.getvalue()))))
    assert found <= max(RATE * 1.5, 8000)
    assert len(samples) / found == pytest.approx(SECONDS, abs=0.01)
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) * found / len(samples) == pytest.approx(440, abs=1)


def test_a_wav_is_what_it_was_made_of():
    samples = np.sin(np.arange(1000) / 5) * 0.9
    found, rate = soundfile.read(io.BytesIO(wav(samples, 8000)))
    assert rate == 8000
    np.testing.assert_allclose(found, samples, atol=1e-4)


@pytest.mark.parametrize("data", [b"", b"nothing", picture_file(1)[:60]])
def test_what_is_no_picture_says_so(data):
    with pytest.raises(ValueError, match=r"not a whole picture|0 bytes|cut off"):
        picture(data)


def test_a_picture_of_too_many_pixels_is_not_decoded():
    out = io.BytesIO()
    Image.new("1", (9000, 9000)).save(out, "PNG")
    with pytest.raises(ValueError, match="9000 x 9000 pixels, more than the limit"):
        picture(out.getvalue())


@pytest.mark.parametrize("data", [b"", b"nothing", sound_file(1)[:20]])
def test_what_is_no_sound_says_so(data):
    with pytest.raises(ValueError, match="not a readable sound"):
        sound(data)


def test_a_sound_without_a_sample_says_so():
    with pytest.raises(ValueError, match="0 samples"):
        sound(wav(np.empty(0), 8000))
