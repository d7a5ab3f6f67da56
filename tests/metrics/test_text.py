"""Metrics of texts, against torchmetrics, COCO's caption evaluation and plain forms."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.text import BLEUScore, CharErrorRate, WordErrorRate

from mmformer.metrics.text import (
    bleu,
    bleu_counts,
    bleu_of_counts,
    character_error_rate,
    cider_d,
    edits,
    error_counts,
    error_rate,
    rouge_l,
    word_error_rate,
    words,
)

FOUND = [
    "a dog runs across the green grass",
    "two people sit on a wooden bench in the park",
    "a plate of food on a table",
    "cat",
]
WANTED = [
    ["a brown dog runs on the green grass", "the dog runs across"],
    ["two people sitting on a bench in the park", "a man and a woman sit on a wooden bench", "people in a park"],
    ["a white plate with food on a wooden table"],
    ["a cat is sleeping", "cat on a mat"],
]
SPLIT = [text.split() for text in FOUND]
REFERENCES = [[text.split() for text in texts] for texts in WANTED]
SENTENCES = st.lists(st.sampled_from("abcd"), max_size=7)


def test_words_of_a_text() -> None:
    assert words("The dog's bowl, isn't it? 1 café-bar…") == ["the", "dog's", "bowl", "isn't", "it", "1", "café", "bar"]


@pytest.mark.parametrize("order", [1, 2, 4])
def test_bleu_equals_torchmetrics(order: int) -> None:
    theirs = BLEUScore(n_gram=order)(FOUND, WANTED).item()
    assert bleu(SPLIT, REFERENCES, order) == pytest.approx(theirs, rel=1e-6)
    assert theirs > 0


def test_bleu_of_counts_is_that_of_the_rows() -> None:
    counts = np.stack([bleu_counts(f, r) for f, r in zip(SPLIT, REFERENCES, strict=True)])
    assert bleu_of_counts(counts[1:3]) == pytest.approx(bleu(SPLIT[1:3], REFERENCES[1:3]))
    assert bleu([["x"]], [[["y"]]]) == 0


def test_equals_cocos_evaluation() -> None:
    evaluation = pytest.importorskip("pycocoevalcap.cider.cider", reason="needs pycocoevalcap, 101 MB for two oracles")
    from pycocoevalcap.rouge.rouge import Rouge

    given, wanted = {i: [text] for i, text in enumerate(FOUND)}, dict(enumerate(WANTED))
    _, ciders = evaluation.Cider().compute_score(wanted, given)
    assert cider_d(SPLIT, REFERENCES) == pytest.approx(ciders.tolist(), rel=1e-9)
    _, rouges = Rouge().compute_score(wanted, given)
    ours = [rouge_l(f, r) for f, r in zip(SPLIT, REFERENCES, strict=True)]
    assert ours == pytest.approx(rouges.tolist(), rel=1e-9)


def test_cider_equals_a_dense_form() -> None:
    """Equation 3 with vectors over all n-grams that occur, in place of dictionaries of those of one text."""
    total = np.zeros(len(SPLIT))
    for size in (1, 2, 3, 4):
        every = sorted({g for texts in (SPLIT, *REFERENCES) for text in texts for g in grams(text, size)})
        seen = np.array([sum(any(g in grams(t, size) for t in texts) for texts in REFERENCES) for g in every])
        idf = np.log(len(SPLIT)) - np.log(np.maximum(seen, 1))

        def vector(text: list[str], size: int = size, every: list = every, idf: np.ndarray = idf) -> np.ndarray:
            return np.array([grams(text, size).count(g) for g in every]) * idf

        for i, (text, texts) in enumerate(zip(SPLIT, REFERENCES, strict=True)):
            for other in texts:
                a, b = vector(text), vector(other)
                norm = np.linalg.norm(a) * np.linalg.norm(b)
                penalty = math.exp(-((len(text) - len(other)) ** 2) / 72)
                total[i] += 10 / 4 / len(texts) * penalty * (np.minimum(a, b) @ b / norm if norm else 0)
    assert cider_d(SPLIT, REFERENCES) == pytest.approx(total.tolist())


def grams(text: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]


def test_cider_of_the_references_themselves() -> None:
    copies = [texts[0] for texts in REFERENCES[:3]]  # long enough to have n-grams of every size
    assert cider_d(copies, [[text] for text in copies]) == pytest.approx([10.0] * 3)
    with pytest.raises(ValueError, match="1 texts and 2 to compare with"):
        cider_d([["a"]], [[["a"]], [["b"]]])


@given(SENTENCES, SENTENCES)
def test_rouge_and_edits_equal_their_recursions(a: list[str], b: list[str]) -> None:
    @cache
    def common(i: int, j: int) -> int:
        if not i or not j:
            return 0
        return common(i - 1, j - 1) + 1 if a[i - 1] == b[j - 1] else max(common(i - 1, j), common(i, j - 1))

    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edits(a, b) == distance(len(a), len(b))
    wanted = 2 * common(len(a), len(b)) / (len(a) + len(b)) if a and b else 0
    assert rouge_l(a, [b], beta=1.0) == pytest.approx(wanted)


def test_error_rates_equal_torchmetrics() -> None:
    found, wanted = ["a dog runs", "the sky", "", "yes  no"], ["the dog ran far", "the sky", "gone", "yes no"]
    assert word_error_rate(found, wanted) == pytest.approx(WordErrorRate()(found, wanted).item())
    assert character_error_rate(found, wanted) == pytest.approx(CharErrorRate()(found, wanted).item())
    with pytest.raises(ValueError, match="1 references without a word"):
        error_rate(error_counts([["a"]], [[]]))
