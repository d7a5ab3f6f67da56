from __future__ import annotations

import numpy as np
from sklearn.metrics import confusion_matrix

from mmformer.report.statistics import confusion, majority


def test_confusion_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    labels = ["a", "b", "c"]
    targets, said = random.choice(labels, 50).tolist(), random.choice(labels, 50).tolist()
    np.testing.assert_array_equal(confusion(targets, said, labels), confusion_matrix(targets, said, labels=labels))


def test_majority_is_taken_from_the_training_labels():
    assert majority(["a", "b", "b", "b"]) == ("b", 0.75)
    assert majority(["a", "b", "b", "b"], ["a", "a", "b"]) == ("a", 0.25)
