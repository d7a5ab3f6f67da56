from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmformer.datasets.containers import check_audio_container, check_image_container
from mmformer.datasets.sources import DecodeError

RNG = np.random.default_rng(0)
SOUND = (0.3 * np.sin(np.arange(4000) / 9) + 0.05 * RNG.standard_normal(4000)).astype(np.float32)


def sound(form: str, subtype: str | None = None, **options) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, SOUND, 8000, format=form, subtype=subtype, **options)
    return stream.getvalue()


def picture(form: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(stream, form, **options)
    return stream.getvalue()


SOUNDS = {
    "wav": sound("WAV"),
    "wavex": sound("WAVEX"),
    "float wav": sound("WAV", "FLOAT"),
    "big-endian wav": sound("WAV", endian="BIG"),
    "rf64": sound("RF64"),
    "aiff": sound("AIFF"),
    "vorbis": sound("OGG", "VORBIS"),
    "opus": sound("OGG", "OPUS"),
}
PICTURES = {
    "png": picture("PNG"),
    "jpeg": picture("JPEG"),
    "jpeg with a thumbnail": b"\xff\xd8\xff\xe1\x00\x08\xff\xd8\xff\xd9xx\xff" + picture("JPEG")[2:],
    "progressive": picture("JPEG", progressive=True),
    "webp": picture("WEBP"),
}


def check(data: bytes, checker) -> None:
    stream = io.BytesIO(data)
    checker(stream)
    assert stream.tell() == 0


@pytest.mark.parametrize("name", SOUNDS)
def test_a_cut_sound_is_found(name) -> None:
    data = SOUNDS[name]
    check(data, check_audio_container)
    for place in (*range(13, 60), *range(60, len(data), 97), len(data) - 1):
        with pytest.raises(DecodeError, match=r"cut off|damaged"):
            check(data[:place], check_audio_container)


@pytest.mark.parametrize("name", PICTURES)
def test_a_cut_picture_is_found(name) -> None:
    data = PICTURES[name]
    check(data, check_image_container)
    for place in (*range(13, len(data), 31), len(data) - 1):
        with pytest.raises(DecodeError, match="cut off"):
            check(data[:place], check_image_container)


@pytest.mark.parametrize("name", ["png", "jpeg", "jpeg with a thumbnail", "progressive"])
def test_a_tail_of_zeros_is_found(name) -> None:
    data = PICTURES[name]
    for place in range(len(data) // 2, len(data) - 8, 53):
        with pytest.raises(DecodeError, match="cut off"):
            check(data[:place] + bytes(len(data) - place), check_image_container)


@given(name=st.sampled_from(["vorbis", "opus"]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_of_an_ogg_file_is_found(name, place, bit) -> None:
    data = bytearray(SOUNDS[name])
    at = int(place * len(data))
    data[at] ^= 1 << bit
    if at >= 4:  # before, it is no Ogg file any more
        with pytest.raises(DecodeError, match=r"damaged|cut off"):
            check(bytes(data), check_audio_container)


@given(
    st.binary(max_size=200),
    st.sampled_from([b"RIFF0000WAVE", b"FORM0000AIFF", b"OggS", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b""]),
)
def test_any_bytes_are_a_reason_or_nothing(data, head) -> None:
    for checker in (check_audio_container, check_image_container):
        with suppress(DecodeError):
            check(head + data, checker)
