"""SentencePiece models (unigram and BPE) to the `tokenizers` package; the library itself is not needed.

A `.model` is a protocol buffer; the fields used here are those of sentencepiece_model.proto
(github.com/google/sentencepiece, arXiv 1808.06226).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2


class PieceType(IntEnum):
    """What a piece is for; ids of control pieces are never those of a text."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its place is its id."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """What of a `.model` decides how a text is cut."""

    pieces: list[Piece] = field(repr=False)
    kind: int
    byte_fallback: bool
    charsmap: bytes = field(repr=False)
    dummy_prefix: bool
    remove_extra_spaces: bool

    @property
    def unknown(self) -> int:
        return next(i for i, piece in enumerate(self.pieces) if piece.type is PieceType.UNKNOWN)

    def of_type(self, *types: PieceType) -> list[str]:
        return [piece.text for piece in self.pieces if piece.type in types]


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a `.model`.

    Raises:
        ValueError: not such a file, or one that asks for what the conversion lacks; the message says what.
    """
    try:
        model = _parse(path.read_bytes())
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no SentencePiece model that can be read: {error}") from error
    if not model.of_type(PieceType.UNKNOWN):
        raise ValueError(f"{path} has no piece for what is unknown among its {len(model.pieces)}")
    return model


def from_sentencepiece(model: SentencePieceModel) -> Tokenizer:
    """The same tokenizer, for texts that its `CharacterMap` has been applied to: the ids are SentencePiece's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    if model.kind == _UNIGRAM:
        scores = [(piece.text, piece.score) for piece in model.pieces]
        out = Tokenizer(models.Unigram(scores, model.unknown, model.byte_fallback))
    else:
        ids = {piece.text: i for i, piece in enumerate(model.pieces)}
        unknown = model.pieces[model.unknown].text
        out = Tokenizer(
            models.BPE(ids, _merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
        )
    out.normalizer = normalizers.Sequence(_normalizers(model))
    strip = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    out.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    specials = model.of_type(PieceType.CONTROL, PieceType.UNKNOWN)
    out.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    return out


@dataclass(frozen=True)
class CharacterMap:
    """The character normalisation of a SentencePiece model, NFKC for most: the longest match at each place is replaced.

    `tokenizers` has it too, but looks at whole graphemes, so that it loses a mark that a letter bears, for one.
    """

    blob: bytes = field(repr=False)

    def __call__(self, text: str) -> str:
        if self._keeps_ascii and text.isascii() and text.isprintable():
            return text
        data, out, at = text.encode("utf-8"), bytearray(), 0
        while at < len(data):
            found, length = self._longest(data, at)
            # What has no entry stays: one character, whose first byte tells its length.
            length = length or (1 if data[at] < 0x80 else 2 if data[at] < 0xE0 else 3 if data[at] < 0xF0 else 4)
            out += data[at : at + length] if found is None else self._replacement(found)
            at += length
        return out.decode("utf-8")

    @cached_property
    def _parts(self) -> tuple[tuple[int, ...], bytes]:
        """The units of the trie (a double array, github.com/s-yata/darts-clone), and the replacements."""
        (size,) = struct.unpack_from("<I", self.blob)
        return struct.unpack_from(f"<{size // 4}I", self.blob, 4), self.blob[4 + size :]

    @cached_property
    def _keeps_ascii(self) -> bool:
        """Whether what an English keyboard writes stays as it is; not so where capital letters are folded."""
        return all(self._longest(bytes([code]), 0)[0] is None for code in range(32, 127))

    def _longest(self, data: bytes, start: int) -> tuple[int | None, int]:
        """The place of the replacement for the longest key that the text has here, and the key's length."""
        units = self._parts[0]
        found, length, place = None, 0, _offset(units[0])
        for at in range(start, len(data)):
            place ^= data[at]
            unit = units[place] if place < len(units) else 0
            if unit & 0x800000FF != data[at]:
                break
            place ^= _offset(unit)
            if unit >> 8 & 1:
                found, length = units[place] & 0x7FFFFFFF, at + 1 - start
        return found, length

    def _replacement(self, place: int) -> bytes:
        strings = self._parts[1]
        return strings[place : strings.index(b"\0", place)]


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 512) >> 6)


def _normalizers(model: SentencePieceModel) -> list:
    from tokenizers import Regex, normalizers

    steps: list = []
    if model.remove_extra_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", _SPACE))
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if model.remove_extra_spaces:  # the sign itself, where a text ends with it, goes as a space does
        steps.append(normalizers.Replace(Regex(f"{_SPACE}+\\z"), ""))
    return steps


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best piece first: SentencePiece joins by the score of the whole."""
    normal = {p.text: p.score for p in model.pieces if p.type is PieceType.NORMAL}
    return [
        (text[:cut], text[cut:])
        for text in sorted(normal, key=lambda text: -normal[text])
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]


def _parse(data: bytes) -> SentencePieceModel:
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:
            trainer = _message(value)
        elif number == 3:
            normalizer = _message(value)
    kind = trainer.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise ValueError(f"it is of type {kind} (words or characters); unigram (1) and BPE (2) are read")
    if trainer.get(24, 0):
        raise ValueError("it writes white space behind a word (treat_whitespace_as_suffix), which is not supported")
    if not normalizer.get(5, 1):
        raise ValueError("it keeps white space as it is (escape_whitespaces), which is not supported")
    if other := [piece.text for piece in pieces if piece.type in (PieceType.USER_DEFINED, PieceType.UNUSED)]:
        raise ValueError(
            f"its pieces {', '.join(other[:3])} are defined by a user, or unused, which is not supported: "
            "give a tokenizer.json"
        )
    return SentencePieceModel(
        pieces=pieces,
        kind=kind,
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=normalizer.get(2, b""),
        dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_spaces=bool(normalizer.get(4, 1)),
    )


def _piece(message: dict) -> Piece:
    (score,) = struct.unpack("<f", message.get(2, b"\0\0\0\0"))
    return Piece(message[1].decode("utf-8"), score, PieceType(message.get(3, 1)))


def _message(data: int | bytes) -> dict:
    """The fields of a message by number, of repeated ones the last."""
    if not isinstance(data, bytes):
        raise ValueError("a number stands where a message is expected")
    return dict(_fields(data))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protocol buffer."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            length, at = (8, at) if kind == 1 else (4, at) if kind == 5 else _varint(data, at)
            value, at = data[at : at + length], at + length
            if at > len(data):
                raise ValueError("it is cut off")
        else:
            raise ValueError(f"a field of wire type {kind}")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
