"""What frozen embeddings are worth, judged without training anything."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_CHUNK = 1024
"""Test rows whose similarities to all training rows are held at a time."""


def knn_probe(
    train_embeddings: Float[Tensor, "N D"],
    train_labels: Int[Tensor, " N"],
    test_embeddings: Float[Tensor, "M D"],
    k: int,
    temperature: float = 0.07,
) -> Float[Tensor, "M C"]:
    """The share of votes for each class among the `k` nearest training rows, as in DINO (arXiv 2104.14294, F.5).

    Near is a large cosine s, and a neighbour's vote weighs exp(s / temperature). Classes are 0 to the largest label.

    Raises:
        ValueError: `k` below 1, or training rows fewer than `k`.
    """
    if not 1 <= k <= len(train_labels):
        raise ValueError(f"k is {k} with {len(train_labels)} training rows: choose 1 to {len(train_labels)}")
    keys = torch.nn.functional.normalize(train_embeddings.float(), dim=-1)
    queries = torch.nn.functional.normalize(test_embeddings.float(), dim=-1)
    votes = queries.new_zeros(len(queries), int(train_labels.max()) + 1)
    for start in range(0, len(queries), _CHUNK):
        similarity, nearest = (queries[start : start + _CHUNK] @ keys.T).topk(k, dim=-1)
        # softmax is the weights divided by their sum, and cannot overflow
        votes[start : start + _CHUNK].scatter_add_(1, train_labels[nearest], (similarity / temperature).softmax(-1))
    return votes
