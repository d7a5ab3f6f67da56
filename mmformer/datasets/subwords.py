"""The vocabulary files of published tokenizers (WordPiece, byte-level BPE, CLIP's BPE) to the `tokenizers` package."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Merges = Sequence[tuple[str, str]]

_CLIP_MERGES = 49152 - 256 - 2
"""How many of the merges of its file CLIP uses; the rest of the file is unused."""
_CLIP_BYTES = 64 << 20
CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"


def word_piece(path: Path, lower_case: bool | None, strip_accents: bool | None, split_chinese: bool) -> Tokenizer:
    """BERT's tokenizer of a `vocab.txt`; with None for `lower_case`, it lowers if no piece has a capital letter.

    `strip_accents` is by default as `lower_case` (github.com/google-research/bert).

    Raises:
        ValueError: a file without [UNK].
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if "[UNK]" not in pieces:
        raise ValueError(f"{path} has no [UNK] among its {len(pieces)} pieces: it is no vocabulary of WordPiece")
    if lower_case is None:
        lower_case = not any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
    model = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=split_chinese, strip_accents=strip_accents, lowercase=lower_case
    )
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece(prefix="##")
    return model


def read_bpe(vocab: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A `vocab.json`, and the `merges.txt` beside it, most frequent first.

    Raises:
        FileNotFoundError: no merges.txt.
        ValueError: files that are no BPE.
    """
    merges = vocab.with_name("merges.txt")
    if not merges.is_file():
        raise FileNotFoundError(f"{merges} is missing: byte-pair encoding needs it beside {vocab.name}")
    ids = json.loads(vocab.read_text(encoding="utf-8"))
    if not isinstance(ids, dict) or not all(isinstance(i, int) for i in ids.values()):
        raise ValueError(f"{vocab} is no vocabulary: a JSON object of token -> id is wanted")
    return ids, _pairs(merges, merges.read_text(encoding="utf-8"))


def byte_level_bpe(ids: dict[str, int], merges: Merges, add_prefix_space: bool) -> Tokenizer:
    """GPT-2's tokenizer, also that of RoBERTa and Whisper (github.com/openai/gpt-2)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model = Tokenizer(models.BPE(ids, list(merges)))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    model.decoder = decoders.ByteLevel()
    return model


def clip_bpe(ids: dict[str, int], merges: Merges) -> Tokenizer:
    """CLIP's tokenizer: BPE of words in lower case, each ended by `</w>`, without a token for white space."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = Tokenizer(models.BPE(ids, list(merges), unk_token=CLIP_END, end_of_word_suffix="</w>"))
    model.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # The suffix becomes a space before the byte symbols become bytes; the last word's space goes.
    model.decoder = decoders.Sequence([decoders.BPEDecoder("</w>"), decoders.Replace(" ", "Ġ"), decoders.ByteLevel()])
    return model


def read_clip_bpe(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and merges of `bpe_simple_vocab_16e6.txt.gz`, as OpenAI's and open_clip's tokenizers make it."""
    with gzip.open(path) as stream:
        data = stream.read(_CLIP_BYTES + 1)
    if len(data) > _CLIP_BYTES:
        raise ValueError(f"{path} unpacks to more than {_CLIP_BYTES >> 20} MiB: it is not CLIP's file of merges")
    merges = _pairs(path, data.decode("utf-8"))[:_CLIP_MERGES]
    symbols = _byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    return {token: i for i, token in enumerate([*tokens, CLIP_BEGIN, CLIP_END])}, merges


def _pairs(path: Path, text: str) -> list[tuple[str, str]]:
    """The lines of a file of merges, of which the first may say its version."""
    lines = text.split("\n")
    if lines[0].startswith(("#version", '"bpe_simple_vocab')):
        lines = lines[1:]
    pairs = [tuple(line.split(" ")) for line in lines if line]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise ValueError(f"{path} holds the line {' '.join(wrong)!r}: two pieces with a space between them are wanted")
    return pairs  # pyright: ignore[reportReturnType]


def _byte_symbols() -> list[str]:
    """The character that stands for each byte: itself if it can be seen, else one from U+0100 on; those come last."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*(chr(byte) for byte in seen), *(chr(256 + i) for i in range(256 - len(seen)))]
