"""Zero-shot classifiers are open_clip's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmformer.metrics.zeroshot import PICTURES, class_ranks, class_vectors, top_accuracy

NAMES = ["cat", "dog", "great auk"]


def embed(texts: list[str]) -> Tensor:
    """A vector of a text that depends on all of it, of no particular length."""
    rows = [torch.randn(6, generator=torch.Generator().manual_seed(hash_of(text))) for text in texts]
    return 3 * torch.stack(rows)


def hash_of(text: str) -> int:
    return sum((i + 1) * ord(letter) for i, letter in enumerate(text))


def test_equals_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip, the reference of zero-shot classifiers")

    class Tower:
        def encode_text(self, vectors: Tensor, normalize: bool) -> Tensor:
            return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors

    theirs = open_clip.build_zero_shot_classifier(Tower(), embed, NAMES, PICTURES, num_classes_per_batch=2)
    torch.testing.assert_close(class_vectors(embed, NAMES, PICTURES), theirs.T)


def test_ranks_and_accuracy() -> None:
    classes = class_vectors(embed, NAMES)
    target = torch.tensor([0, 1, 2, 2])
    vectors = 7 * classes[torch.tensor([0, 1, 2, 0])]
    ranks = class_ranks(vectors, classes, target)
    assert ranks[:3].tolist() == [1, 1, 1]
    assert top_accuracy(ranks) == 0.75
    assert top_accuracy(ranks, 3) == 1
    assert class_ranks(torch.zeros(1, 6), normalize(torch.rand(3, 6), dim=-1), target[:1]).tolist() == [2]


def test_refuses_templates_without_a_place() -> None:
    with pytest.raises(ValueError, match="'a photo' has no place for the name"):
        class_vectors(embed, NAMES, ["a photo"])
    with pytest.raises(ValueError, match="0 classes and 1 templates"):
        class_vectors(embed, [])
