"""Whether a file is whole, by the lengths and checksums it states itself.

Decoders of damaged files often return what is left of them, or noise, without a word. These checks decode nothing.
"""

from __future__ import annotations

import struct
import zlib

from mmformer.datasets.sources import DecodeError, Stream

_OGG_HEADER = 27
_LAST_PAGE = 4
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_JPEG_SCAN, _JPEG_END = 0xDA, b"\xff\xd9"


def check_image_container(stream: Stream) -> None:
    """Look for the end of a PNG, JPEG or WebP file, and leave the stream at its start.

    Raises:
        DecodeError: the end is missing.
    """
    head = stream.read(12)
    end = stream.seek(0, 2)
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        _find_chunk(stream, end, 8, ">I", b"IEND", overhead=12)
    elif head[:2] == b"\xff\xd8":
        _find_jpeg_end(stream)
    elif head[:4] == b"RIFF" and head[8:] == b"WEBP":
        _compare(struct.unpack("<I", head[4:8])[0], end - 8)
    stream.seek(0)


def check_audio_container(stream: Stream) -> None:
    """Check a WAV or AIFF file against its own length and an Ogg file against its checksums; return to its start.

    Raises:
        DecodeError: the file is shorter than it says, damaged, or its last page is missing.
    """
    head = stream.read(12)
    end = stream.seek(0, 2)
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        _compare(*_find_chunk(stream, end, 12, "<I", b"data", alignment=2))
    elif head[:4] == b"RIFX" and head[8:] == b"WAVE":
        _compare(*_find_chunk(stream, end, 12, ">I", b"data", alignment=2))
    elif head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
        _compare(*_find_chunk(stream, end, 12, ">I", b"SSND", alignment=2))
    elif head[:4] == b"OggS":
        stream.seek(0)
        _check_pages(stream.read())
    stream.seek(0)


def _compare(stated: int, held: int) -> None:
    if stated > held:
        raise DecodeError(f"cut off: its header says {stated:,} bytes, {held:,} are there")


def _find_chunk(
    stream: Stream, end: int, place: int, number: str, wanted: bytes, *, overhead: int = 8, alignment: int = 1
) -> tuple[int, int]:
    """The length that a chunk states, and how many bytes are left for it.

    In PNG a length comes before the name and a checksum after the content; in RIFF and AIFF the name comes first.
    """
    name_first = overhead == 8
    long_size = None
    while place + overhead <= end:
        stream.seek(place)
        head = stream.read(8)
        name, size_bytes = (head[:4], head[4:]) if name_first else (head[4:], head[:4])
        size = struct.unpack(number, size_bytes)[0]
        if name == b"ds64":  # RF64 states lengths above 4 GB here (EBU Tech 3306)
            long_size = struct.unpack("<Q", stream.read(16)[8:].ljust(8, b"\0"))[0]
        if name == wanted:
            stated = long_size if long_size is not None and size == 0xFFFFFFFF else size
            return stated, end - place - overhead
        place += overhead + size + size % alignment
    raise DecodeError(f"cut off or damaged: it has no {wanted.decode()} chunk")


def _find_jpeg_end(stream: Stream) -> None:
    """Step over the segments to the first scan, as a thumbnail before it has an end of its own; look from there."""
    stream.seek(2)
    while len(head := stream.read(4)) == 4 and head[0] == 0xFF and head[1] != _JPEG_SCAN:
        # Fill bytes may stand before a marker.
        stream.seek(-3 if head[1] == 0xFF else struct.unpack(">H", head[2:])[0] - 2, 1)
    if _JPEG_END not in stream.read():
        raise DecodeError("cut off: the end marker of JPEG is missing")


def _check_pages(data: bytes) -> None:
    """Check every page of an Ogg file (RFC 3533), and that the last is marked as such."""
    place = flags = 0
    while place < len(data):
        head = data[place : place + _OGG_HEADER]
        lengths = data[place + _OGG_HEADER : place + _OGG_HEADER + (head[26] if len(head) == _OGG_HEADER else 0)]
        stop = place + _OGG_HEADER + len(lengths) + sum(lengths)
        if head[:4] != b"OggS" or stop > len(data):
            raise DecodeError(f"cut off or damaged from byte {place:,} of {len(data):,} on")
        page = data[place:stop]
        if _ogg_checksum(page[:22] + bytes(4) + page[26:]) != struct.unpack("<I", page[22:26])[0]:
            raise DecodeError(f"damaged: the checksum of the page at byte {place:,} is wrong")
        flags = head[5]
        place = stop
    if not flags & _LAST_PAGE:
        raise DecodeError("cut off: its last page is missing")


def _ogg_checksum(page: bytes) -> int:
    """Ogg's CRC-32 runs over the bits in the other direction than zlib's, and starts and ends without inversion."""
    mirrored = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
