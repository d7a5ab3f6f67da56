"""Text to token ids: bytes, words of a training set, or byte-pair encoding; any that is saved can be opened."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import tokenizers

PAD, BOS, EOS, UNK, MASK = range(5)
"""Ids of the special tokens in every vocabulary made here; ids of the text start behind them."""

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<mask>")


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Ids of the special tokens of a vocabulary; None, or (), for what it lacks.

    `begin` and `end` are what its model wants before and behind a text: none, one or several tokens.
    """

    pad: int | None = None
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    unknown: int | None = None
    mask: int | None = None

    @property
    def all(self) -> tuple[int, ...]:
        """Every id that is no piece of a text."""
        single = (i for i in (self.pad, self.unknown, self.mask) if i is not None)
        return tuple(sorted({*single, *self.begin, *self.end}))


_OWN = SpecialIds(pad=PAD, begin=(BOS,), end=(EOS,), unknown=UNK, mask=MASK)


@runtime_checkable
class Tokenizer(Protocol):
    """Encodes text without the special tokens, whose ids are `specials`."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def specials(self) -> SpecialIds: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens and ids of none are left out."""
        ...

    def save(self, path: Path) -> None:
        """Write it to a .json file that `load_tokenizer` reads."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """The bytes of UTF-8; a lone surrogate, which UTF-8 does not have, becomes three bytes and survives."""

    @classmethod
    def train(cls, texts: Iterable[str]) -> ByteTokenizer:
        """The tokenizer, which needs no texts."""
        return cls()

    @property
    def vocab_size(self) -> int:
        return len(SPECIALS) + 256

    @property
    def specials(self) -> SpecialIds:
        return _OWN

    def encode(self, text: str) -> list[int]:
        return [byte + len(SPECIALS) for byte in text.encode("utf-8", "surrogatepass")]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        data = bytes(i - len(SPECIALS) for i in ids if len(SPECIALS) <= i < self.vocab_size)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # a model may write bytes that are no text
            return data.decode("utf-8", "replace")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"bytes": True}), encoding="utf-8")


_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class WordTokenizer:
    """Words in lower case and single punctuation marks of a known list; any other is `<unk>`."""

    words: tuple[str, ...]

    @classmethod
    def train(cls, texts: Iterable[str], max_words: int = 10_000) -> WordTokenizer:
        """The commonest words of the texts."""
        counts = Counter(word for text in texts for word in _WORD.findall(text.lower()))
        return cls(tuple(sorted(counts, key=lambda word: (-counts[word], word))[:max_words]))

    @property
    def vocab_size(self) -> int:
        return len(SPECIALS) + len(self.words)

    @property
    def specials(self) -> SpecialIds:
        return _OWN

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words, len(SPECIALS))}

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, UNK) for word in _WORD.findall(text.lower())]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The words with a space between them, also before punctuation; unknown ones are shown as `<unk>`."""
        known = [i for i in ids if i == UNK or len(SPECIALS) <= i < self.vocab_size]
        return " ".join(SPECIALS[UNK] if i == UNK else self.words[i - len(SPECIALS)] for i in known)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"words": self.words}, ensure_ascii=False), encoding="utf-8")


@dataclass(frozen=True, eq=False)
class BPE:
    """Byte-pair encoding over bytes: every text can be written, none is unknown; a lone surrogate becomes U+FFFD.

    `model` is a tokenizer of the `tokenizers` package whose first tokens are SPECIALS.
    """

    model: tokenizers.Tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPE:
        """Merge the commonest pairs of the texts until there are `vocab_size` tokens, at least 261."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        least = len(SPECIALS) + 256
        if vocab_size < least:
            raise ValueError(f"vocab_size {vocab_size}: at least {least}, the 256 bytes and {len(SPECIALS)} specials")
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator((valid_text(text) for text in texts), trainer)
        return cls._of(model)

    @classmethod
    def load(cls, path: Path) -> BPE:
        import tokenizers

        return cls._of(tokenizers.Tokenizer.from_file(str(path)))

    @classmethod
    def _of(cls, model: tokenizers.Tokenizer) -> BPE:
        keep_to_one_thread()
        # A text that says "<pad>" must not become the token.
        model.encode_special_tokens = True
        return cls(model)

    def __reduce__(self) -> tuple:
        return BPE._of, (self.model,)  # the package's own pickling forgets what _of sets

    @property
    def vocab_size(self) -> int:
        return self.model.get_vocab_size()

    @property
    def specials(self) -> SpecialIds:
        return _OWN

    def encode(self, text: str) -> list[int]:
        return self.model.encode(valid_text(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        found = self.model.encode_batch_fast([valid_text(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([i for i in ids if len(SPECIALS) <= i < self.vocab_size], skip_special_tokens=True)

    def save(self, path: Path) -> None:
        self.model.save(str(path))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read what `save` of any of them wrote, or the tokenizer of published weights: see `read_tokenizer`."""
    from mmformer.datasets.pretrained import read_tokenizer

    held = json.loads(path.read_text(encoding="utf-8")) if path.name == "tokenizer.json" else {}
    if held.get("bytes"):
        return ByteTokenizer()
    if "words" in held:
        return WordTokenizer(tuple(held["words"]))
    first = [token["content"] for token in held.get("added_tokens", [])[: len(SPECIALS)]]
    return BPE.load(path) if first == list(SPECIALS) else read_tokenizer(path)


def keep_to_one_thread() -> None:
    """Threads of the `tokenizers` package do not survive the fork of a loader's worker; without this it says so."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


_SURROGATE = re.compile("[\ud800-\udfff]")


def valid_text(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which UTF-8 does not have."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)
