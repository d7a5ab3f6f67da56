"""Retrieval metrics equal torchmetrics' and scikit-learn's without ties, and with them means over random orders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import Tensor
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP, RetrievalMRR

from mmformer.metrics.retrieval import (
    average_precisions,
    first_ranks,
    in_folds,
    judge_vectors,
    median_rank,
    recalls,
    reciprocal_rank,
    rsum,
)


def captioned(pictures: int = 12, captions: int = 5, dim: int = 7) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Pictures, five captions of each that lie near them, and the groups of both."""
    keys = torch.randn(pictures, dim).repeat_interleave(captions, 0)
    groups = (torch.arange(pictures), torch.arange(pictures).repeat_interleave(captions))
    return keys[::captions] + torch.randn(pictures, dim), keys + torch.randn(pictures * captions, dim), groups


def flat(queries: Tensor, keys: Tensor, groups: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, relevance and query of every pair, as torchmetrics takes them: what scores 0 or less is none to it."""
    relevant = groups[0][:, None] == groups[1]
    index = torch.arange(len(queries))[:, None].expand(-1, len(keys))
    return (queries @ keys.T).exp().flatten(), relevant.flatten(), index.flatten()


@pytest.mark.parametrize("to_picture", [False, True])
def test_equals_torchmetrics(to_picture: bool) -> None:
    queries, keys, groups = captioned()
    if to_picture:
        queries, keys, groups = keys, queries, groups[::-1]
    scores, relevant, index = flat(queries, keys, groups)
    ranks = judge_vectors(first_ranks, queries, keys, groups, chunk=5)
    for cut, value in recalls(ranks, (1, 3, 10)).items():
        torch.testing.assert_close(value, RetrievalHitRate(top_k=int(cut[2:]))(scores, relevant, indexes=index).item())
    torch.testing.assert_close(reciprocal_rank(ranks), RetrievalMRR()(scores, relevant, indexes=index).item())
    precision = judge_vectors(average_precisions, queries, keys, groups, chunk=5)
    torch.testing.assert_close(precision.mean().item(), RetrievalMAP()(scores, relevant, indexes=index).item())


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6))
def test_a_tied_rank_is_the_mean_over_random_orders(keys: list[tuple[int, bool]]) -> None:
    from itertools import permutations

    if not any(relevant for _, relevant in keys):
        return
    scores = torch.tensor([[float(score) for score, _ in keys]])
    relevant = torch.tensor([[right for _, right in keys]])
    firsts = []
    for order in permutations(keys):
        ordered = sorted(order, key=lambda key: -key[0])  # stable: equal scores stay in the order of the permutation
        firsts.append(1 + next(i for i, (_, right) in enumerate(ordered) if right))
    assert first_ranks(scores, relevant).item() == pytest.approx(sum(firsts) / len(firsts))


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
def test_average_precision_cuts_ties_together(keys: list[tuple[int, bool]]) -> None:
    if not any(relevant for _, relevant in keys):
        return
    scores, relevant = [float(score) for score, _ in keys], [right for _, right in keys]
    found = average_precisions(torch.tensor([scores]), torch.tensor([relevant]))
    assert found.item() == pytest.approx(average_precision_score(relevant, scores))


def test_one_score_for_all_is_judged_as_chance() -> None:
    ranks = judge_vectors(first_ranks, torch.zeros(8, 3), torch.randn(8, 3))
    assert ranks.tolist() == [4.5] * 8
    assert recalls(ranks, (1, 4))["r@1"] == 0


def test_a_query_without_an_answer_is_never_found() -> None:
    ranks = first_ranks(torch.rand(2, 4), torch.tensor([[False] * 4, [True] * 4]))
    assert ranks.tolist() == [torch.inf, 1]
    assert recalls(ranks, (4,)) == {"r@4": 0.5}
    assert reciprocal_rank(ranks) == 0.5
    assert average_precisions(torch.rand(1, 4), torch.zeros(1, 4).bool()).tolist() == [0]


def test_medians_and_sums() -> None:
    assert median_rank(torch.tensor([1.0, 2, 9, 100])) == 5.5
    assert median_rank(torch.tensor([1.0, torch.inf, 2.0])) == 2
    assert rsum([torch.ones(3), torch.ones(4)]) == 600
    assert [part.stop for part in in_folds(10, 5)] == [2, 4, 6, 8, 10]


def test_refuses_what_has_no_order() -> None:
    with pytest.raises(ValueError, match="1 of 2 queries have a score that is NaN"):
        first_ranks(torch.tensor([[torch.nan, 1], [0, 1]]), torch.eye(2).bool())
    with pytest.raises(ValueError, match="2 queries and 3 keys: give the groups"):
        judge_vectors(first_ranks, torch.zeros(2, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="10 rows in 3 folds"):
        in_folds(10, 3)
