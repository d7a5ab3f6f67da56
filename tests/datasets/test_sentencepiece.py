from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmformer.datasets.pretrained import read_tokenizer
from mmformer.datasets.sentencepiece import CharacterMap, read_sentencepiece
from mmformer.datasets.tokenizers import load_tokenizer

spm = pytest.importorskip("sentencepiece", reason="the oracle sentencepiece is not installed")

SENTENCES = ["a photo of the cat on the mat", "naïve café, 12 of 345?", "日本語 hello", "ﬁne emoji 😀 don't"] * 40
KINDS = {
    "t5": {"model_type": "unigram", "vocab_size": 70, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "folded": {"model_type": "unigram", "vocab_size": 70, "normalization_rule_name": "nmt_nfkc_cf"},
    "bytes": {"model_type": "unigram", "vocab_size": 330, "byte_fallback": True},
    "llama": {
        "model_type": "bpe",
        "vocab_size": 340,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "bpe": {"model_type": "bpe", "vocab_size": 80},
    "bare": {"model_type": "bpe", "vocab_size": 80, "add_dummy_prefix": False},
}
LETTERS = "acehknopt  \t\nAÉ①ﬁ㌀가각e\u0301日😀👩\u200d▁012?'<s>/\u00a0\u200b\u0301é"
TEXTS = st.text(st.sampled_from(LETTERS)) | st.text(max_size=20)


def train(path: Path, **options):
    stream = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=stream, hard_vocab_limit=False, minloglevel=3, **options
    )
    path.write_bytes(stream.getvalue())
    return spm.SentencePieceProcessor(model_proto=stream.getvalue())


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "spiece.model"
    reference = train(path, **KINDS[request.param])
    return reference, read_tokenizer(path)


@given(text=TEXTS.filter(lambda text: "\0" not in text))
def test_the_ids_are_those_of_sentencepiece(pair, text) -> None:
    reference, tokenizer = pair
    if any(not (c.isprintable() or c in " \t\n") for c in text) and not text.isprintable():
        text = "".join(c for c in text if c.isprintable() or c in "\t\n")  # controls alone make an empty text there
    expected = reference.encode(text)
    if any(name in text for name in ("<s>", "</s>", "<unk>", "<pad>")):
        assert not {reference.bos_id(), reference.eos_id()} & set(tokenizer.encode(text))
    else:
        assert tokenizer.encode(text) == expected


def test_texts_come_back(pair) -> None:
    reference, tokenizer = pair
    for text in SENTENCES[:4]:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        if tokenizer.specials.unknown not in ids:
            assert tokenizer.decode(ids) == reference.decode(ids)


def test_saved_it_needs_nothing_else(pair, tmp_path) -> None:
    _, tokenizer = pair
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    texts = [*SENTENCES[:4], "E\u0301 ﬁ㌀", "a</s>b"]
    assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert loaded.specials == tokenizer.specials
    assert loaded.vocab_size == tokenizer.vocab_size


@given(st.text(max_size=30))
def test_the_map_of_characters_is_nfkc_for_most(pair, text) -> None:
    reference, tokenizer = pair
    if tokenizer.cleaning.characters is not None:
        text = "".join(c for c in text if c.isprintable())
        normal = reference.normalize(text).replace("▁", " ").strip()
        assert " ".join(tokenizer.cleaning.characters(text).replace("▁", " ").split(" ")).split() == normal.split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "word", "vocab_size": 30}, "of type 3"),
        ({"model_type": "bpe", "vocab_size": 80, "treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        (
            {"model_type": "bpe", "vocab_size": 80, "user_defined_symbols": ["<image>", "@@"]},
            "<image>, @@ are defined by",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, options, message) -> None:
    train(tmp_path / "m.model", **options)
    with pytest.raises(ValueError, match=f"m.model is no SentencePiece model that can be read: .*{message}"):
        read_sentencepiece(tmp_path / "m.model")


@pytest.mark.parametrize("damage", [b"", b"\xff" * 40, b"not a model", None])
def test_a_damaged_file_is_named(tmp_path, damage) -> None:
    path = tmp_path / "m.model"
    train(path, **KINDS["t5"])
    path.write_bytes(path.read_bytes()[:-60] if damage is None else damage)
    with pytest.raises(ValueError, match=r"m\.model (is no SentencePiece model|has no piece)"):
        read_sentencepiece(path)


def test_a_map_without_entries_changes_nothing() -> None:
    empty = CharacterMap(b"\4\0\0\0" + b"\0\0\0\0")
    assert empty("naïve ﬁ 日本 😀") == "naïve ﬁ 日本 😀"
