"""Tokenizers of published weights, read from the files that come with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmformer.datasets.cleaning import NONE, Cleaning
from mmformer.datasets.sentencepiece import CharacterMap, from_sentencepiece, read_sentencepiece
from mmformer.datasets.subwords import byte_level_bpe, clip_bpe, read_bpe, read_clip_bpe, word_piece
from mmformer.datasets.tokenizer_files import TokenizerFiles, read_object
from mmformer.datasets.tokenizers import SpecialIds, Tokenizer, keep_to_one_thread, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Model

_MASKS = ("[MASK]", "<mask>")
_PROPERTIES = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, eq=False)
class PretrainedTokenizer:
    """A tokenizer of the `tokenizers` package, and the special tokens that its weights know.

    A text that spells a special token becomes that token only with `parse_specials`; otherwise it stays a text.
    """

    model: Model = field(repr=False)
    specials: SpecialIds
    cleaning: Cleaning = NONE
    parse_specials: bool = False

    def __post_init__(self) -> None:
        keep_to_one_thread()
        self.model.encode_special_tokens = not self.parse_specials
        self.model.no_truncation()  # how long an item is, is for the feature to say
        self.model.no_padding()

    def __reduce__(self) -> tuple:
        return from_json, (self.to_json(),)  # the package's own pickling forgets what is set above

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; weights may have more rows, for a round number."""
        return self._num_ids

    @cached_property
    def _num_ids(self) -> int:
        return 1 + max(self.model.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        cleaned = [self.cleaning(text) for text in texts]
        found = self._encode(cleaned)
        if not self.parse_specials:
            # A unigram model finds "</s>" in a text like any other piece: there a space is put into it.
            for i in (i for i, ids in enumerate(found) if not self._special.isdisjoint(ids)):
                apart = self._spelt.sub(lambda name: f"{name[0][0]} {name[0][1:]}", cleaned[i])
                found[i] = [id for id in self._encode([apart])[0] if id not in self._special]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size and i not in self._special]
        return self.model.decode(known, skip_special_tokens=True)

    def save(self, path: Path) -> None:
        path.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The content of `tokenizer.json`: as the package itself writes it, for others to read, where that says all."""
        held = json.loads(self.model.to_str())
        held["padding"] = _padding(self.model, self.specials.pad)
        told = replace(_special_ids(self.model), pad=self.specials.pad)
        if self.cleaning == NONE and not self.parse_specials and told == self.specials:
            return json.dumps(held, ensure_ascii=False)
        more = {"specials": asdict(self.specials), "cleaning": self.cleaning.to_plain()}
        more |= {"parse_specials": self.parse_specials}
        return json.dumps({**more, "tokenizer": held}, ensure_ascii=False)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.model.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _special(self) -> frozenset[int]:
        """What no text may become."""
        added = self.model.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special) - {self.specials.unknown}

    @cached_property
    def _spelt(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(self.model.id_to_token(i) or "") for i in self._special))


def from_json(text: str) -> PretrainedTokenizer:
    """What `PretrainedTokenizer.to_json` wrote, or a `tokenizer.json` of the `tokenizers` package.

    Raises:
        ValueError: it is neither.
    """
    from tokenizers import Tokenizer

    held = json.loads(text)
    ours = held if "tokenizer" in held else {}
    try:
        model = Tokenizer.from_str(json.dumps(held["tokenizer"]) if ours else text)
    except Exception as error:  # whatever the package raises, of no class of its own
        raise ValueError(f"not a tokenizer that the tokenizers package reads: {error}") from error
    if not ours:
        return PretrainedTokenizer(model, _special_ids(model))
    named = held["specials"]
    specials = SpecialIds(**{**named, "begin": tuple(named["begin"]), "end": tuple(named["end"])})
    return PretrainedTokenizer(model, specials, Cleaning.from_plain(held["cleaning"]), held["parse_specials"])


def read_tokenizer(
    path: Path | str,
    begin: Sequence[str] | None = None,
    end: Sequence[str] | None = None,
    pad: str | None = None,
    lower_case: bool | None = None,
    cleaning: Cleaning | None = None,
    parse_specials: bool = False,
) -> PretrainedTokenizer:
    """The tokenizer of a `tokenizer.json`, `vocab.txt`, `vocab.json`, SentencePiece `.model` or CLIP's `.gz` of merges.

    What is None, the files beside it tell (tokenizer_config.json, special_tokens_map.json, added_tokens.json,
    config.json). `begin` and `end` name the tokens around a text, `pad` the one that fills up; `lower_case` concerns
    vocab.txt only. `cleaning` is what texts go through first; `parse_specials` turns "<s>" in a text into that token.

    Raises:
        FileNotFoundError: the file, or one that it needs, is missing.
        ValueError: a file of another kind, or a special token that the vocabulary lacks; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give tokenizer.json, vocab.txt, vocab.json or a .model")
    if path.name == "vocab.txt" or path.name == "vocab.json" or path.suffix in (".model", ".gz"):
        found = _from_vocabulary(TokenizerFiles.beside(path), lower_case)
    elif path.suffix == ".json":
        found = _from_tokenizer_json(path)
    else:
        raise ValueError(f"{path} is no tokenizer: give tokenizer.json, vocab.txt, vocab.json, a .model or CLIP's .gz")
    specials = found.specials
    if begin is not None or end is not None:
        specials = replace(
            specials,
            begin=specials.begin if begin is None else _ids(found.model, begin, path),
            end=specials.end if end is None else _ids(found.model, end, path),
        )
        _put_around(found.model, specials)
    if pad is not None:
        specials = replace(specials, pad=_ids(found.model, [pad], path)[0])
    cleaned = found.cleaning if cleaning is None else found.cleaning.after(cleaning)
    return PretrainedTokenizer(found.model, specials, cleaned, parse_specials or found.parse_specials)


def pretrained_tokenizer(texts: Iterable[str], path: str, **options: Any) -> Tokenizer:
    """`load_tokenizer`, or with options `read_tokenizer`, for a data set's config: its texts do not change it."""
    return read_tokenizer(path, **options) if options else load_tokenizer(Path(path))


def _from_tokenizer_json(path: Path) -> PretrainedTokenizer:
    try:
        found = from_json(json.dumps(read_object(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    files = TokenizerFiles.beside(path)
    if files.lower_case:
        _lower(found.model)
    _add(found.model, files)
    specials = found.specials
    if "add_bos_token" in files.settings or "add_eos_token" in files.settings:
        begin, end = files.around((), ())
        specials = replace(specials, begin=_ids(found.model, begin, path), end=_ids(found.model, end, path))
        _put_around(found.model, specials)
    named = {role: found.model.token_to_id(name) for role, name in files.names.items()}
    pad, mask = named.get("pad_token", specials.pad), named.get("mask_token", specials.mask)
    return replace(found, specials=replace(specials, pad=pad, mask=mask))


def _from_vocabulary(files: TokenizerFiles, lower_case: bool | None) -> PretrainedTokenizer:
    """A tokenizer of plain files, where the family says what the vocabulary does not."""
    path, cleaning = files.path, NONE
    if path.suffix == ".model":
        pieces = read_sentencepiece(path)
        family = files.family("sentencepiece")
        model = from_sentencepiece(pieces)
        sentinels = files.settings.get("extra_ids", family.extra_ids)
        model.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(sentinels))])
        characters = CharacterMap(pieces.charsmap) if pieces.charsmap else None
        cleaning = Cleaning(canonical=family.canonical, characters=characters)
    elif path.name == "vocab.txt":
        family = files.family("bert")
        settings = {"strip_accents": None, "tokenize_chinese_chars": True, **files.settings}
        lower = files.settings.get("do_lower_case") if lower_case is None else lower_case
        model = word_piece(path, lower, settings["strip_accents"], settings["tokenize_chinese_chars"])
    elif path.suffix == ".gz":
        family = files.family("clip")
        model = clip_bpe(*read_clip_bpe(path))
    else:
        ids, merges = read_bpe(path)
        words = any(token.endswith("</w>") for token in ids)
        family = files.family("clip" if words else "roberta" if {"<s>", "</s>"} <= set(ids) else "gpt2")
        model = clip_bpe(ids, merges) if words else byte_level_bpe(ids, merges, files.add_prefix_space)
    _add(model, files)
    files = files.of(family)
    _mark(model, [name for name in files.names.values() if model.token_to_id(name) is not None])
    begin, end = files.around(family.begin, family.end)
    specials = replace(_special_ids(model), begin=_ids(model, begin, path), end=_ids(model, end, path))
    if specials.begin or specials.end:
        _put_around(model, specials)
    named = {role: model.token_to_id(name) for role, name in files.names.items()}
    specials = replace(specials, pad=named.get("pad_token"), mask=named.get("mask_token"))
    return PretrainedTokenizer(model, specials, cleaning)


def _add(model: Model, files: TokenizerFiles) -> None:
    """Add the tokens that the files name, each with its id, and mark those with a role as special.

    Raises:
        ValueError: an id that does not follow the others.
    """
    from tokenizers import AddedToken

    for id, token in files.added.items():
        model.add_tokens([AddedToken(**{name: token[name] for name in _PROPERTIES if name in token})])
        if model.token_to_id(token["content"]) != id:
            raise ValueError(
                f"{files.path}: the added token {token['content']!r} should have the id {id}, but the vocabulary "
                f"gives it {model.token_to_id(token['content'])}: one before it is missing"
            )
    _mark(model, files.names.values())


def _mark(model: Model, names: Iterable[str]) -> None:
    """Make special tokens of these, new ones where the vocabulary lacks them."""
    from tokenizers import AddedToken

    model.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])


def _ids(model: Model, names: Sequence[str], path: Path) -> tuple[int, ...]:
    found = {name: model.token_to_id(name) for name in names}
    if missing := [name for name, id in found.items() if id is None]:
        raise ValueError(f"{path} has no token {', '.join(map(repr, missing))} among its {model.get_vocab_size()}")
    return tuple(id for id in found.values() if id is not None)


def _put_around(model: Model, specials: SpecialIds) -> None:
    """Let the package itself put the tokens around a text, for others that read what is saved."""
    from tokenizers import processors

    around = {id: str(model.id_to_token(id)) for id in (*specials.begin, *specials.end)}
    single = [*(around[id] for id in specials.begin), "$A", *(around[id] for id in specials.end)]
    model.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, id) for id, name in around.items()]
    )


def _lower(model: Model) -> None:
    from tokenizers import normalizers

    rest = [model.normalizer] if model.normalizer else []
    model.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])


def _special_ids(model: Model) -> SpecialIds:
    """What the package's own description of a tokenizer tells."""
    from tokenizers import Tokenizer, models

    before, behind = [], []
    if model.post_processor is not None:
        text = Tokenizer(models.WordLevel({"x": 0})).encode("x")
        framed = model.post_processor.process(text, None, True)
        place = framed.special_tokens_mask.index(0)
        before, behind = framed.ids[:place], framed.ids[place + 1 :]
    held = json.loads(model.to_str())
    padding, core = held["padding"] or {}, held["model"]
    unknown = core.get("unk_id") if "unk_id" in core else model.token_to_id(core.get("unk_token") or "")
    masks = [id for name in _MASKS if (id := model.token_to_id(name)) is not None]
    return SpecialIds(
        pad=padding.get("pad_id"),
        begin=tuple(before),
        end=tuple(behind),
        unknown=unknown,
        mask=masks[0] if masks else None,
    )


def _padding(model: Model, pad: int | None) -> dict[str, Any] | None:
    """How the package writes which token fills up."""
    if pad is None:
        return None
    fixed = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_type_id": 0}
    return {**fixed, "pad_id": pad, "pad_token": model.id_to_token(pad)}
