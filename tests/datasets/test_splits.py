from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmformer.datasets.splits import TEST, TRAIN, VAL, split_by_fold, split_by_hash, split_by_name
from mmformer.datasets.tables import ManifestError


@given(st.sets(st.text(max_size=5), min_size=3, max_size=40), st.integers(0, 5), st.randoms())
def test_a_hash_gives_every_split_rows_in_any_order(keys, seed, random) -> None:
    keys = sorted(keys)
    split = dict(zip(keys, split_by_hash(keys, seed).tolist(), strict=True))
    assert set(split.values()) == {TRAIN, VAL, TEST}
    random.shuffle(keys)
    assert split_by_hash(keys, seed).tolist() == [split[key] for key in keys]


def test_shares_and_stability_of_the_hash() -> None:
    keys = [f"row {i}" for i in range(20_000)]
    split = split_by_hash(keys, 0)
    np.testing.assert_allclose(np.bincount(split) / len(keys), [0.8, 0.1, 0.1], atol=0.01)
    assert (split_by_hash(keys[:15_000], 0) == split[:15_000]).all(), "rows that come later change no other"
    assert (split_by_hash(keys, 1) != split).mean() > 0.3


def test_names() -> None:
    cells = ["train", "VAL", "Valid ", "validation", "test"]
    assert split_by_name("split", cells, list("abcde"), 0).tolist() == [TRAIN, VAL, VAL, VAL, TEST]
    with pytest.raises(ManifestError, match="row 'b' has 'no value'"):
        split_by_name("split", ["train", None], ["a", "b"], 0)


def test_folds() -> None:
    assert split_by_fold("fold", ["1", "2", "3", "10"], 10).tolist() == [VAL, TRAIN, TRAIN, TEST]
    assert split_by_fold("fold", [1.0, 2.0, 3.0], 1).tolist() == [TEST, VAL, TRAIN]
    for cells, fold, message in [
        (["1", "2", "3"], 4, "holds folds 1, 2, 3, data.fold=4"),
        (["1", "2"], 1, "at least three"),
        (["1", None, "2"], 1, "1 rows have no fold"),
    ]:
        with pytest.raises(ManifestError, match=message):
            split_by_fold("fold", cells, fold)
