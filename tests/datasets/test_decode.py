from __future__ import annotations

import io
import warnings
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torchaudio.functional import resample

from mmformer.datasets.decode import audio_length, decode_audio, decode_image, image_size
from mmformer.datasets.sources import DecodeError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
SOUND = (0.3 * np.sin(np.arange(3000) / 9) + 0.05 * RNG.standard_normal(3000)).astype(np.float32)
LIMIT = 1_000_000


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def recorded(samples: np.ndarray, rate: int = 8000, form: str = "WAV", subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=form, subtype=subtype)
    return stream.getvalue()


# Pictures


def test_every_way_to_give_a_picture_is_the_same(tmp_path) -> None:
    data = saved(Image.fromarray(PIXELS))
    (tmp_path / "ä b.png").write_bytes(data)
    given = [data, tmp_path / "ä b.png", str(tmp_path / "ä b.png"), Image.fromarray(PIXELS), PIXELS]
    given += [torch.from_numpy(PIXELS), torch.from_numpy(PIXELS).permute(2, 0, 1), PIXELS / 255]
    for value in given:
        assert torch.equal(decode_image(value, LIMIT), torch.from_numpy(PIXELS))
        assert image_size(value, LIMIT) == (12, 20)


def test_transparency_is_white() -> None:
    clear = np.concatenate([PIXELS, np.zeros((12, 20, 1), np.uint8)], 2)
    palette = Image.fromarray(PIXELS).quantize(4)
    palette.info["transparency"] = bytes(4)
    grey = Image.merge("LA", [Image.new("L", (3, 2), 7), Image.new("L", (3, 2), 0)])
    for image in (Image.fromarray(clear), palette, grey):
        for data in (image, saved(image)):
            assert (decode_image(data, LIMIT) == 255).all(), image.mode


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "HSV"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_rgb_or_grey(mode, channels) -> None:
    found = decode_image(Image.fromarray(PIXELS).convert(mode), LIMIT, channels=channels)
    assert found.shape == (12, 20, channels)
    assert found.dtype == torch.uint8


def test_sixteen_bits_are_scaled() -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    data = saved(Image.fromarray(values))
    assert decode_image(data, LIMIT, channels=1)[..., 0].tolist() == [[0, 1, 128, 255]]
    assert decode_image(saved(Image.fromarray(values), "TIFF"), LIMIT)[0, :, 0].tolist() == [0, 1, 128, 255]
    with pytest.raises(DecodeError, match="pixels of mode 'F' have no known range"):
        decode_image(saved(Image.fromarray(values.astype(np.float32)), "TIFF"), LIMIT)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_followed(orientation, form) -> None:
    image = Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, form, exif=exif)
    turned = {3: 2, 6: 3, 8: 1}.get(orientation)  # quarter turns against the clock
    found = decode_image(data, LIMIT)
    assert image_size(data, LIMIT) == tuple(found.shape[:2])
    assert tuple(found.shape[:2]) == ((96, 160) if orientation < 5 else (160, 96))
    if turned is not None and form in ("PNG", "TIFF"):
        assert np.array_equal(found.numpy(), np.rot90(np.asarray(image), turned))


def test_a_jpeg_is_reduced_while_it_is_decoded() -> None:
    image = Image.fromarray(PIXELS).resize((800, 480))
    found = decode_image(saved(image, "JPEG"), LIMIT, reduce_to=lambda *_: 100)
    assert tuple(found.shape) == (120, 200, 3)
    assert tuple(decode_image(saved(image), LIMIT, reduce_to=lambda *_: 100).shape) == (480, 800, 3)


def test_a_picture_too_large_is_refused_by_its_header() -> None:
    bomb = saved(Image.new("1", (9000, 9000)))
    for check in (decode_image, image_size):
        with pytest.raises(DecodeError, match=r"9000 x 9000 pixels, more than the limit of 1,000,000 \(max_pixels\)"):
            check(bomb, LIMIT)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "empty"),
        (b"GIF89a", "not a whole picture"),
        (b"<svg/>", "not a whole picture: cannot identify image file$"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify image file"),
        ("/no/such/file.png", "no such file"),
        (3, "a int, not a path, bytes or decoded"),
        (np.zeros((2, 3, 5), np.uint8), r"an array of shape \(2, 3, 5\)"),
        (np.zeros((2, 3), np.int32), "an array of int32"),
        (np.full((2, 3), 7.0), "floats outside 0 to 1"),
        (np.zeros((0, 3), np.uint8), r"an array of shape \(0, 3\)"),
    ],
)
def test_what_is_no_picture_has_a_reason(value, reason) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode_image(value, LIMIT)


# Sounds


@pytest.mark.parametrize(
    ("form", "subtype", "exact"),
    [
        ("WAV", None, 1e-4),
        ("WAV", "FLOAT", 0),
        ("FLAC", None, 1e-4),
        ("AIFF", None, 1e-4),
        ("OGG", "VORBIS", None),
        ("OGG", "OPUS", None),
        ("MP3", None, None),
    ],
)
def test_every_format_is_read(form, subtype, exact, tmp_path) -> None:
    data = recorded(SOUND, form=form, subtype=subtype)
    (tmp_path / "a").write_bytes(data)
    found = decode_audio(data, 8000, 10.0)
    assert torch.equal(found, decode_audio(tmp_path / "a", 8000, 10.0))
    assert found.dtype == torch.float32
    assert len(found) == audio_length(data, 8000, 10.0) == 3000
    if exact is not None:
        np.testing.assert_allclose(found, SOUND, atol=exact)


@given(st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000, 7919, 44101]), st.integers(1, 3000))
def test_any_rate_is_resampled_to_the_length_foretold(rate, length) -> None:
    found = decode_audio((SOUND[:length], rate), 8000, 10.0)
    assert len(found) == audio_length((SOUND[:length], rate), 8000, 10.0)
    assert abs(len(found) - length * 8000 / rate) < 2 + 0.001 * length
    if rate == 48000:
        torch.testing.assert_close(found, resample(torch.from_numpy(SOUND[:length]), rate, 8000))


def test_channels_are_averaged_and_arrays_scaled() -> None:
    stereo = np.stack([SOUND, -SOUND], 1)
    assert decode_audio(recorded(stereo), 8000, 10.0).abs().max() < 1e-4
    for array in (stereo, stereo.T, torch.from_numpy(stereo)):
        assert decode_audio((array, 8000), 8000, 10.0).shape == (3000,)
    whole = (SOUND * 32768).astype(np.int16)
    np.testing.assert_allclose(decode_audio(whole, 8000, 10.0), SOUND, atol=1e-4)
    assert decode_audio(np.full(9, 128, np.uint8), 8000, 10.0).tolist() == [0.0] * 9


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "empty"),
        (b"no sound at all, but some text", "not a whole recording"),
        (recorded(SOUND[:0]), "zero-length"),
        (recorded(SOUND)[:-9], "cut off: its header says 6,000 bytes, 5,991 are there"),
        (recorded(SOUND, form="MP3")[:-300], "cut off: .* of 3000 samples are there"),
        (recorded(np.full(9, np.nan, np.float32), subtype="FLOAT"), "9 samples are NaN or infinite"),
        (recorded(np.zeros(80_001, np.int16)), r"10\.0 s, more than the limit of 10 s \(max_seconds\)"),
        (recorded(SOUND, form="CAF"), "CAF is not read"),
        ((SOUND, 0), "a sample rate of 0"),
        (np.zeros((2, 2, 2)), "an array of float64 of shape"),
        (np.zeros(0), "zero-length"),
        ({"path": "a.wav"}, "a dict, not a path"),
    ],
)
def test_what_is_no_recording_has_a_reason(value, reason) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode_audio(value, 8000, 10.0)


# Damage


def damaged(data: bytes, kind: str, place: int, noise: int) -> bytes:
    if kind == "cut":
        return data[:place]
    if kind == "zeros":
        return data[:place] + bytes(len(data) - place)
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ (1 << noise % 8)]) + data[place + 1 :]
    return data[:place] + np.random.default_rng(noise).bytes(64) + data[place + 64 :]


MEDIA = {
    "png": saved(Image.fromarray(PIXELS)),
    "jpeg": saved(Image.fromarray(PIXELS).resize((80, 60)), "JPEG"),
    "webp": saved(Image.fromarray(PIXELS).resize((80, 60)), "WEBP"),
    "gif": saved(Image.fromarray(PIXELS), "GIF"),
    "tiff": saved(Image.fromarray(PIXELS), "TIFF"),
    "wav": recorded(SOUND),
    "flac": recorded(SOUND, form="FLAC"),
    "ogg": recorded(SOUND, form="OGG"),
}
ALWAYS_FOUND = {
    ("png", "flip"),
    ("png", "zeros"),
    ("jpeg", "zeros"),
    ("ogg", "flip"),
    ("ogg", "zeros"),
    ("flac", "zeros"),
}


def decoded(name: str, data: bytes) -> torch.Tensor | None:
    """What comes of a file: nothing but a tensor or a DecodeError may."""
    with suppress(DecodeError):
        return decode_audio(data, 8000, 10.0) if name in ("wav", "flac", "ogg") else decode_image(data, LIMIT)
    return None


@pytest.mark.parametrize("name", MEDIA)
@pytest.mark.parametrize("kind", ["cut", "zeros", "flip", "noise"])
def test_damage_never_crashes_and_a_cut_is_always_found(name, kind) -> None:
    data, whole = MEDIA[name], decoded(name, MEDIA[name])
    assert whole is not None
    found: Counter[str] = Counter()
    for noise in range(60):
        place = int(RNG.integers(0, len(data) - 1))
        changed = damaged(data, kind, place, noise)
        tensor = decoded(name, changed)
        same = tensor is not None and (changed == data or torch.equal(tensor, whole))
        found["error" if tensor is None else "same" if same else "other"] += 1
    if kind == "cut" or (name, kind) in ALWAYS_FOUND:
        assert not found["other"], found


def test_decoding_changes_no_global_state() -> None:
    before = list(warnings.filters)
    decoded("png", MEDIA["png"][:-20])
    assert warnings.filters == before
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
