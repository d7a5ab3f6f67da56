from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmformer.datasets.cleaning import Cleaning
from mmformer.datasets.features import Text
from mmformer.datasets.pretrained import PretrainedTokenizer, read_tokenizer
from mmformer.datasets.subwords import read_clip_bpe
from mmformer.datasets.tokenizers import SpecialIds, load_tokenizer

TEXTS = [
    "The cat's on   a Mat, naïve café!",
    "日本語 hello",
    "12 34.5 don't !!'s",
    "  x ",
    "emoji 😀 ok",
    "ÀÉ e\u0301",
    "new\nline\ttab",
]
VALID = st.text(st.characters(exclude_categories=["Cs"]))
PIECES = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *"abcdefghijklmnopqrstuvwxyzTM.,!'日本語0123456789",
    *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"),
    *("the", "cat", "mat", "hello", "ca", "##fe", "nai", "##ve", "The", "Mat"),
]


def framed(tokenizer: PretrainedTokenizer, text: str) -> list[int]:
    return [*tokenizer.specials.begin, *tokenizer.encode(text), *tokenizer.specials.end]


def write(path: Path, held: object) -> None:
    path.write_text(json.dumps(held), encoding="utf-8")


def byte_level(folder: Path, tokenizer_class: str | None, specials: list[str], **settings) -> None:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS * 9, vocab_size=310, min_frequency=1, special_tokens=specials)
    trained.save_model(str(folder))
    write(folder / "tokenizer_config.json", {"tokenizer_class": tokenizer_class, **settings})


def oracle(name: str, folder: Path):
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    return getattr(transformers, name).from_pretrained(folder)


@pytest.fixture
def word_piece(tmp_path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return tmp_path / "vocab.txt"


@pytest.mark.parametrize("lower", [True, False])
def test_word_piece_is_that_of_bert(word_piece, lower) -> None:
    write(word_piece.with_name("tokenizer_config.json"), {"tokenizer_class": "BertTokenizer", "do_lower_case": lower})
    tokenizer, reference = read_tokenizer(word_piece), oracle("BertTokenizer", word_piece.parent)
    for text in TEXTS:
        assert framed(tokenizer, text) == reference(text)["input_ids"]
    assert tokenizer.specials == SpecialIds(pad=0, begin=(2,), end=(3,), unknown=1, mask=4)
    assert tokenizer.decode(framed(tokenizer, "hello mat,")) == "hello mat,"


def test_word_piece_lowers_where_no_piece_has_a_capital(word_piece) -> None:
    assert read_tokenizer(word_piece).encode("The cat") == [PIECES.index("The"), PIECES.index("cat")]
    assert read_tokenizer(word_piece, lower_case=True).encode("The") == [PIECES.index("the")]
    word_piece.write_text("\n".join(piece for piece in PIECES if piece.startswith("[") or piece.islower()))
    assert read_tokenizer(word_piece).decode(read_tokenizer(word_piece).encode("The cat")) == "the cat"
    word_piece.write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"has no \[UNK\] among its 2 pieces"):
        read_tokenizer(word_piece)


@pytest.mark.parametrize("tokenizer_class", ["RobertaTokenizer", None])
def test_byte_pairs_are_those_of_roberta(tmp_path, tokenizer_class) -> None:
    byte_level(tmp_path, tokenizer_class, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer, reference = read_tokenizer(tmp_path / "vocab.json"), oracle("RobertaTokenizer", tmp_path)
    for text in TEXTS:
        assert framed(tokenizer, text) == reference(text)["input_ids"]
    assert tokenizer.specials == SpecialIds(pad=1, begin=(0,), end=(2,), mask=4)


@pytest.mark.parametrize(("settings", "begin"), [({}, ()), ({"add_bos_token": True}, (0,))])
def test_byte_pairs_are_those_of_gpt2(tmp_path, settings, begin) -> None:
    byte_level(tmp_path, "GPT2Tokenizer", ["<|endoftext|>"], **settings)
    tokenizer, reference = read_tokenizer(tmp_path / "vocab.json"), oracle("GPT2Tokenizer", tmp_path)
    for text in TEXTS:
        assert framed(tokenizer, text) == reference(text)["input_ids"]
    assert tokenizer.specials == SpecialIds(begin=begin)
    name = "<|endoftext|>"
    around = read_tokenizer(tmp_path / "vocab.json", begin=[name], end=[name], pad=name)
    assert around.specials == SpecialIds(pad=0, begin=(0,), end=(0,))
    with pytest.raises(ValueError, match=r"vocab.json has no token '<eot>' among its 310"):
        read_tokenizer(tmp_path / "vocab.json", end=["<eot>"])


def test_byte_pairs_and_added_tokens_are_those_of_whisper(tmp_path) -> None:
    byte_level(tmp_path, "WhisperTokenizer", [])
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>", "<|0.00|>"]
    size = len(json.loads((tmp_path / "vocab.json").read_text()))
    added = {str(size + i): {"content": name, "special": name != "<|0.00|>"} for i, name in enumerate(names)}
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "WhisperTokenizer", "added_tokens_decoder": added})
    write(tmp_path / "added_tokens.json", {name: size + i for i, name in enumerate(names)})
    tokenizer, reference = read_tokenizer(tmp_path / "vocab.json"), oracle("WhisperTokenizer", tmp_path)
    for text in TEXTS:
        assert framed(tokenizer, text) == reference(text)["input_ids"]
    assert tokenizer.specials.begin == (size + 1, size + 4)
    prompt = read_tokenizer(tmp_path / "vocab.json", begin=names[1:5])
    assert prompt.specials.begin == (size + 1, size + 2, size + 3, size + 4)
    assert prompt.specials.end == (size,)

    write(tmp_path / "added_tokens.json", {"<|endoftext|>": size + 1})
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "WhisperTokenizer"})
    with pytest.raises(ValueError, match=rf"'<\|endoftext\|>' should have the id {size + 1}, but"):
        read_tokenizer(tmp_path / "vocab.json")


@given(text=VALID)
def test_byte_pairs_bring_back_any_text(gpt2, text) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> PretrainedTokenizer:
    folder = tmp_path_factory.mktemp("gpt2")
    byte_level(folder, "GPT2Tokenizer", ["<|endoftext|>"])
    return read_tokenizer(folder / "vocab.json")


# ------------------------------------------------------------------ CLIP


@pytest.fixture(scope="module")
def merges() -> Path:
    open_clip = pytest.importorskip("open_clip", reason="open_clip brings CLIP's vocabulary")
    return Path(open_clip.tokenizer.default_bpe())


@pytest.fixture(scope="module")
def clip(merges) -> PretrainedTokenizer:
    return read_tokenizer(merges)


CLIP_TEXTS = [*TEXTS, "word " * 100, "a &amp; b &lt;3", "â€œquotedâ€\x9d ΣΑΣ", "the dog's O'Neil they're 100%"]


def test_clip_is_that_of_open_clip(clip, merges) -> None:
    open_clip = pytest.importorskip("open_clip", reason="the oracle open_clip is not installed")
    reference, repairing = open_clip.SimpleTokenizer(), read_tokenizer(merges, cleaning=Cleaning(repair=True))
    assert clip.vocab_size == reference.vocab_size == 49408
    assert framed(clip, "a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    for text in CLIP_TEXTS:
        assert repairing.encode(text) == reference.encode(text)
        item, expected = Text(repairing, 77, begin=True, end=True)(text), reference(text)[0]
        assert item.tolist() == expected[: len(item)].tolist()
        assert not expected[len(item) :].any()
        assert item[-1] == 49407
    for text in [*TEXTS, CLIP_TEXTS[-1]]:
        assert clip.encode(text) == reference.encode(text)
        assert clip.decode(clip.encode(text)) == reference.decode(clip.encode(text)).strip()


def test_clip_is_that_of_transformers(clip, merges, tmp_path) -> None:
    ids, pairs = read_clip_bpe(merges)
    write(tmp_path / "vocab.json", ids)
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, pairs)]), encoding="utf-8")
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"})
    tokenizer, reference = read_tokenizer(tmp_path / "vocab.json"), oracle("CLIPTokenizer", tmp_path)
    for text in CLIP_TEXTS:
        assert framed(tokenizer, text) == framed(clip, text) == reference(text)["input_ids"]
        item = Text(tokenizer, 77, begin=True, end=True)(text)
        assert item.tolist() == reference(text, max_length=77, truncation=True)["input_ids"]


def test_a_text_that_spells_a_special_token_stays_a_text(clip) -> None:
    spelt = "<|endoftext|> and <|startoftext|>"
    assert max(clip.encode(spelt)) < 49406
    assert clip.decode(clip.encode(spelt)).replace(" ", "") == spelt.replace(" ", "")


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path) -> None:
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(65):
            stream.write(b"a" * (1 << 20))
    with pytest.raises(ValueError, match="unpacks to more than 64 MiB"):
        read_tokenizer(path)
    path.write_bytes(gzip.compress(b"i n\nthree pieces here\n"))
    with pytest.raises(ValueError, match="holds the line 'three pieces here'"):
        read_tokenizer(path)


# ------------------------------------------------------------------ tokenizer.json and what lies beside it


@pytest.mark.parametrize("options", [{}, {"parse_specials": True}, {"cleaning": Cleaning(canonical=True)}])
def test_saved_and_pickled_it_is_the_same(word_piece, tmp_path, options) -> None:
    tokenizer = read_tokenizer(word_piece, **options)
    tokenizer.save(tmp_path / "saved.json")
    (tmp_path / "model").mkdir()
    (tmp_path / "saved.json").rename(tmp_path / "model" / "tokenizer.json")
    for same in (load_tokenizer(tmp_path / "model" / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert isinstance(same, PretrainedTokenizer)
        assert same.specials == tokenizer.specials
        assert same.vocab_size == tokenizer.vocab_size == len(PIECES)
        for text in ("the [MASK] cat!", *TEXTS):
            assert same.encode(text) == tokenizer.encode(text)
    assert (PIECES.index("[MASK]") in tokenizer.encode("the [MASK]")) == ("parse_specials" in options)


def test_a_plain_one_is_saved_for_other_libraries_too(word_piece, tmp_path) -> None:
    tokenizer = read_tokenizer(word_piece)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved" / "tokenizer.json")
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "saved" / "tokenizer.json"))
    for text in TEXTS:
        assert reference(text)["input_ids"] == framed(tokenizer, text)
    assert reference.pad_token == "[PAD]"


def test_tokenizer_json_of_transformers_is_read_with_what_lies_beside_it(word_piece, tmp_path) -> None:
    reference = oracle("BertTokenizer", word_piece.parent)
    reference.save_pretrained(tmp_path / "saved")
    tokenizer = read_tokenizer(tmp_path / "saved" / "tokenizer.json")
    assert tokenizer.specials == read_tokenizer(word_piece).specials
    for text in TEXTS:
        assert framed(tokenizer, text) == reference(text)["input_ids"]
    path = tmp_path / "saved" / "tokenizer_config.json"
    settings = {"add_bos_token": True, "bos_token": "[MASK]", "pad_token": {"content": "[SEP]"}}
    write(path, settings)
    changed = read_tokenizer(tmp_path / "saved" / "tokenizer.json").specials
    assert (changed.begin, changed.end, changed.pad) == ((4,), (), 3)


def test_siglip_2_has_lower_case_although_its_file_does_not_say_so(gpt2, tmp_path) -> None:
    gpt2.save(tmp_path / "tokenizer.json")
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer"})
    write(tmp_path / "config.json", {"model_type": "siglip"})
    assert read_tokenizer(tmp_path / "tokenizer.json").encode("The Cat") == gpt2.encode("the cat")


def test_siglip_and_llama_are_those_of_transformers(tmp_path) -> None:
    from tests.datasets.test_sentencepiece import KINDS, train

    for name, kind, settings in (
        ("SiglipTokenizer", "t5", {}),
        ("T5Tokenizer", "t5", {}),
        ("LlamaTokenizer", "llama", {"add_bos_token": True}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        path = folder / ("tokenizer.model" if kind == "llama" else "spiece.model")
        train(path, **KINDS[kind])
        write(folder / "tokenizer_config.json", {"tokenizer_class": name, **settings})
        tokenizer, reference = read_tokenizer(path), oracle(name, folder)
        assert tokenizer.vocab_size == len(reference)
        for text in ("The cat's on   a Mat, naïve café!", "日本語 hello", "12 34.5 don't!", "e_mail <b>"):
            assert framed(tokenizer, text) == reference(text)["input_ids"]
        if name == "SiglipTokenizer":
            item = Text(tokenizer, 64, begin=False, end=True, pad=True)("A photo of a cat.")
            assert item.tolist() == reference("A photo of a cat.", padding="max_length", max_length=64)["input_ids"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", '{"a": 1}', "merges.txt is missing: byte-pair encoding needs it"),
        ("tokenizer.json", '{"model": 3}', "not a tokenizer that the tokenizers package reads"),
        ("tokenizer.json", "[3]", "holds a list, not a JSON object"),
        ("tokenizer.json", "{", "tokenizer.json is damaged"),
        ("words.tsv", "a", "words.tsv is no tokenizer: give tokenizer.json"),
        ("absent.json", None, "absent.json is missing: give tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path, name, content, message) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_tokenizer(tmp_path / name)


def test_a_family_that_is_not_known_is_not_guessed(tmp_path) -> None:
    byte_level(tmp_path, "Qwen2Tokenizer", ["<|endoftext|>"])
    with pytest.raises(ValueError, match=r"of 'qwen2' cuts a text is not known from vocab\.json alone: give"):
        read_tokenizer(tmp_path / "vocab.json")
