from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmformer.datasets.tokenizers import BPE, SPECIALS, UNK, ByteTokenizer, Tokenizer, WordTokenizer, load_tokenizer

TEXTS = ["what is the sum of the picture and the sound?", "how far apart are the two digits?", "read the digit"] * 5
ANY = st.text(st.characters())
VALID = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe() -> BPE:
    return BPE.train(TEXTS, 300)


@given(ANY)
def test_bytes_bring_back_any_text(text) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode([0, 1, *ids, 2, 4]) == text
    assert all(len(SPECIALS) <= i < tokenizer.vocab_size for i in ids)


@given(text=VALID)
def test_byte_pairs_bring_back_any_text(bpe, text) -> None:
    ids = bpe.encode(text)
    assert bpe.decode([1, *ids, 2]) == text
    assert all(len(SPECIALS) <= i < bpe.vocab_size for i in ids)


def test_a_lone_surrogate_becomes_the_replacement_character(bpe) -> None:
    assert bpe.decode(bpe.encode("a\ud800b")) == "a\ufffdb"


def test_byte_pairs_are_fewer_than_bytes(bpe) -> None:
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    with pytest.raises(ValueError, match="vocab_size 100: at least 261"):
        BPE.train(TEXTS, 100)


@pytest.mark.parametrize("special", SPECIALS)
def test_a_text_cannot_name_a_special_token(bpe, special) -> None:
    for tokenizer in (bpe, pickle.loads(pickle.dumps(bpe)), ByteTokenizer()):
        assert min(tokenizer.encode(special)) >= len(SPECIALS)
        assert tokenizer.decode(tokenizer.encode(special)) == special


@given(st.lists(st.sampled_from(["sum", "Digit", "é", "?", "unseen"]), max_size=8))
def test_words_bring_back_what_was_seen(words) -> None:
    tokenizer = WordTokenizer.train(["sum digit, é?", "sum"])
    expected = ["<unk>" if word == "unseen" else word.lower() for word in words]
    assert tokenizer.decode(tokenizer.encode(" ".join(words))) == " ".join(expected)


def test_words_are_the_commonest() -> None:
    tokenizer = WordTokenizer.train(["b a b", "c a b"], max_words=2)
    assert tokenizer.words == ("b", "a")
    assert tokenizer.encode("a c B") == [6, UNK, 5]
    assert tokenizer.vocab_size == 7


@pytest.mark.parametrize("kind", [ByteTokenizer.train, WordTokenizer.train, lambda texts: BPE.train(texts, 290)])
def test_a_saved_tokenizer_is_the_same(tmp_path, kind) -> None:
    tokenizer: Tokenizer = kind(TEXTS)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert type(loaded) is type(tokenizer)
    assert loaded.vocab_size == tokenizer.vocab_size
    texts = [*TEXTS[:3], "<pad> unseen", ""]
    assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@given(st.lists(st.integers(0, 400)))
def test_any_ids_are_some_text(ids) -> None:
    for tokenizer in (ByteTokenizer(), WordTokenizer.train(TEXTS)):
        assert isinstance(tokenizer.decode(ids), str)
