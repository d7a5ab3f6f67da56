import numpy as np
import pytest
import torch

from mmformer.runtime import Table
from mmformer.search import Index

RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.normal(size=(300, 8)).astype(np.float32)
IDS = [f"r{i}" for i in range(300)]


@pytest.mark.parametrize("half", [False, True])
def test_it_finds_what_the_index_finds(half, tmp_path, monkeypatch):
    monkeypatch.setattr("mmformer.runtime.table.BLOCK", 512)  # several blocks
    index = Index.build(torch.from_numpy(VECTORS), {"id": IDS}, model="m", half=half)
    table = Table.load(Table.of(IDS, VECTORS, half).save(tmp_path / "t.npz"))
    assert len(table) == 300
    queries = RANDOM.normal(size=(5, 8)).astype(np.float32)
    wanted = index.search(torch.from_numpy(queries), 7, model="m")
    found = table.search(queries, 7)
    assert [[hit.id for hit in hits] for hits in found] == [[hit.id for hit in hits] for hits in wanted]
    np.testing.assert_allclose([h.score for h in found[0]], [h.score for h in wanted[0]], atol=1e-6)
    assert table.search(queries[0], 7) == found[0]


def test_rows_keep_their_columns_and_k_may_be_large(tmp_path):
    rows = [{"id": "a", "text": "ünd"}, {"id": "b", "text": None}]
    table = Table.load(Table.of(rows, VECTORS[:2]).save(tmp_path / "t.npz"))
    hits = table.search(VECTORS[1], 10)
    assert [hit.id for hit in hits] == ["b", "a"]
    assert hits[1].row == rows[0]


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(ValueError, match="2 rows for 3 vectors"):
        Table.of(["a", "b"], VECTORS[:3])
    with pytest.raises(ValueError, match="vector 1 is zero, infinite or NaN"):
        Table.of(["a", "b"], np.array([[1.0, 2.0], [np.nan, 1.0]]))
    table = Table.of(IDS, VECTORS)
    with pytest.raises(ValueError, match="vectors of 3 numbers, this table has vectors of 8"):
        table.search(np.ones(3))
    (tmp_path / "t.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no table of vectors, or damaged"):
        Table.load(tmp_path / "t.npz")
    with pytest.raises(FileNotFoundError):
        Table.load(tmp_path / "absent.npz")
