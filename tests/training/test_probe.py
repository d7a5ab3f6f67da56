"""k nearest neighbours, against the sums written out."""

import math

import pytest
import torch

from mmformer.training.probe import knn_probe


def slow(train, labels, test, k, temperature):
    """The votes of DINO's evaluation, row by row."""
    out = torch.zeros(len(test), int(labels.max()) + 1)
    for row, query in enumerate(test):
        cosines = [float(query @ key / (query.norm() * key.norm())) for key in train]
        nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
        weights = [math.exp(cosines[i] / temperature) for i in nearest]
        for i, weight in zip(nearest, weights, strict=True):
            out[row, labels[i]] += weight / sum(weights)
    return out


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_equal_the_sums_written_out(k, temperature):
    train, test = torch.randn(40, 6), torch.randn(9, 6) * 3
    labels = torch.randint(0, 4, (40,))
    found = knn_probe(train, labels, test, k, temperature)
    assert torch.allclose(found, slow(train, labels, test, k, temperature), atol=1e-5)
    assert torch.allclose(found.sum(1), torch.ones(9))


def test_many_rows_are_taken_in_pieces(monkeypatch):
    train, labels, test = torch.randn(30, 6), torch.randint(0, 4, (30,)), torch.randn(11, 6)
    whole = knn_probe(train, labels, test, 5)
    monkeypatch.setattr("mmformer.training.probe._CHUNK", 4)
    assert torch.allclose(knn_probe(train, labels, test, 5), whole, atol=1e-6)


def test_near_neighbours_weigh_more_than_many():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    votes = knn_probe(train, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.3]]), k=3)
    assert votes.argmax() == 0
    assert knn_probe(train, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.3]]), k=3, temperature=100.0).argmax() == 1


@pytest.mark.parametrize("k", [0, 4])
def test_more_neighbours_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=r"k is \d with 3 training rows: choose 1 to 3"):
        knn_probe(torch.randn(3, 2), torch.tensor([0, 1, 1]), torch.randn(2, 2), k)
