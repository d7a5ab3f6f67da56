"""What may come next, against loops over ids and against the processors of transformers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmformer.generation import Limits
from mmformer.generation.limits import forbid_repeats, keep_nucleus, keep_top, penalise

WORDS = 6
HISTORIES = st.lists(st.lists(st.integers(0, WORDS - 1), max_size=9), min_size=1, max_size=4)


def scores(rows: int) -> torch.Tensor:
    return torch.randn(rows, WORDS, generator=torch.Generator().manual_seed(rows))


def aligned(texts: list[list[int]]) -> torch.Tensor:
    """Ids right-aligned behind -1."""
    width = max(map(len, texts))
    rows = [[-1] * (width - len(text)) + text for text in texts]
    return torch.tensor(rows, dtype=torch.long).view(len(texts), width)


@given(HISTORIES)
def test_ids_that_occurred_are_penalised_once(texts):
    given_scores = scores(len(texts))
    found = penalise(given_scores, aligned(texts), 1.5)
    for row, text in enumerate(texts):
        for id in range(WORDS):
            score = float(given_scores[row, id])
            expected = score if id not in text else score * 1.5 if score < 0 else score / 1.5
            assert float(found[row, id]) == pytest.approx(expected, abs=1e-6)


@given(HISTORIES, st.integers(1, 4))
def test_no_run_of_ids_occurs_twice(texts, size):
    found = forbid_repeats(scores(len(texts)), aligned(texts), size)
    for row, text in enumerate(texts):
        runs = {tuple(text[i : i + size]) for i in range(len(text) - size + 1)}
        for id in range(WORDS):
            whole = [*text, id]
            repeats = len(whole) >= size and tuple(whole[len(whole) - size :]) in runs
            assert bool(found[row, id].isinf()) == repeats


def test_the_processors_of_transformers_agree():
    theirs = pytest.importorskip("transformers", reason="the oracle").generation.logits_process
    history, given_scores = torch.tensor([[1, 2, 1, 2, 3, 1], [4, 4, 4, 4, 4, 4]]), scores(2)
    for ours, other in (
        (penalise(given_scores, history, 1.3), theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        (forbid_repeats(given_scores, history, 2), theirs.NoRepeatNGramLogitsProcessor(2)),
        (keep_top(given_scores, 3), theirs.TopKLogitsWarper(3)),
        (keep_nucleus(given_scores, 0.6), theirs.TopPLogitsWarper(0.6)),
    ):
        torch.testing.assert_close(ours, other(history, given_scores.clone()))


def test_a_text_is_long_enough_and_holds_nothing_banned():
    limits = Limits(max_length=5, min_length=2, stop=[1, 4], banned=[0])  # lists, as from YAML
    history = torch.zeros(1, 0, dtype=torch.long)
    for length, forbidden in ((0, {0, 1, 4}), (1, {0, 1, 4}), (2, {0})):
        found = limits(scores(1), history, length)[0]
        assert set(found.isinf().nonzero()[:, 0].tolist()) == forbidden
    assert limits.ends(torch.tensor([[0, 1], [4, 5]])).tolist() == [[False, True], [True, False]]


def test_limits_that_leave_nothing_are_errors():
    with pytest.raises(ValueError, match="a text of 3 to 2 tokens"):
        Limits(max_length=2, min_length=3)
    with pytest.raises(ValueError, match=r"repetition_penalty 0.0"):
        Limits(max_length=2, repetition_penalty=0.0)
