"""Which label is taken for which, and what a model that has learnt nothing would reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int


def majority(targets: Sequence[Hashable], known: Sequence[Hashable] | None = None) -> tuple[Hashable, float]:
    """The most frequent target among `known` (the training labels; the targets themselves where None), and the share
    of `targets` that saying it always would get right."""
    most = Counter(targets if known is None else known).most_common(1)[0][0]
    return most, sum(target == most for target in targets) / len(targets)


def confusion(targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> Int[np.ndarray, "C C"]:
    """How often each label (row) was answered with each (column)."""
    place = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
    rows, columns = [place[t] for t in targets], [place[p] for p in predictions]
    np.add.at(counts, (rows, columns), 1)
    return counts
