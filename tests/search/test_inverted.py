"""The approximate search: what it returns is exact, it finds nearly all, and its lists survive any change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmformer.search import Index
from mmformer.search import index as index_module
from mmformer.search.inverted import Inverted, lists_for

MODEL = "m"


def clustered(count: int, dim: int = 16, centres: int = 20) -> Tensor:
    return torch.randn(centres, dim)[torch.randint(centres, (count,))] + 0.5 * torch.randn(count, dim)


def build(count: int = 3000) -> tuple[Index, Index, Tensor]:
    """The exact index, the approximate one, and queries."""
    pytest.importorskip("faiss", reason="needs faiss (extra search), whose inverted file is used")
    vectors = clustered(count + 60)
    rows = {"id": [str(i) for i in range(count)], "third": [i % 3 for i in range(count)]}
    exact = Index.build(vectors[:count], rows, model=MODEL)
    return exact, exact.approximate(), vectors[count:]


def recall(index: Index, exact: Index, queries: Tensor, **options: object) -> float:
    found = index.nearest(queries, 10, model=MODEL, **options)
    wanted = exact.nearest(queries, 10, model=MODEL, where=options.get("where"))
    same = (found.rows[:, :, None] == wanted.rows[:, None]).any(1)
    return same.float().mean().item()


def test_finds_nearly_all_and_scores_exactly() -> None:
    exact, fast, queries = build()
    assert recall(fast, exact, queries) > 0.95
    assert recall(fast, exact, queries, probes=1) < recall(fast, exact, queries, probes=64)
    assert recall(fast, exact, queries, probes=10_000) > 0.99
    for one, other in zip(
        fast.search(queries, 5, model=MODEL, probes=64), exact.search(queries, 5, model=MODEL), strict=True
    ):
        assert [hit.score for hit in one] == pytest.approx([hit.score for hit in other], abs=1e-5)


@pytest.mark.parametrize("few", [0, 50_000])
def test_filters_by_lists_and_by_rows(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "FEW", few)
    exact, fast, queries = build()
    assert recall(fast, exact, queries, where={"third": 1}) > 0.95
    assert all(
        hit.row["third"] == 1 for hits in fast.search(queries, 9, model=MODEL, where={"third": 1}) for hit in hits
    )
    assert fast.search(queries[:1], 9, model=MODEL, where={"id": "17"})[0][0].id == "17"
    assert fast.search(queries[:1], 9, model=MODEL, where={"third": 5}) == [[]]


def test_rows_that_were_added_are_found_at_once() -> None:
    _, fast, queries = build()
    more = fast.add(queries, {"id": [f"q{i}" for i in range(len(queries))], "third": [0] * len(queries)}, model=MODEL)
    found = more.search(queries, 1, model=MODEL)
    assert [hits[0].id for hits in found] == [f"q{i}" for i in range(len(queries))]
    assert more.inverted is fast.inverted
    assert more.approximate().inverted.count == len(more)


def test_rows_that_were_removed_are_not_found() -> None:
    exact, fast, queries = build()
    gone = [str(i) for i in range(0, 3000, 2)]
    fewer, wanted = fast.remove(gone), exact.remove(gone)
    assert fewer.inverted.count == 1500
    assert recall(fewer, wanted, queries) > 0.95
    assert not {hit.id for hits in fewer.search(queries, 20, model=MODEL) for hit in hits} & set(gone)
    whole = fast.add(queries, {"id": [f"q{i}" for i in range(60)], "third": [0] * 60}, model=MODEL)
    assert whole.remove([str(i) for i in range(3000)]).inverted is None


def test_loads_what_was_saved(tmp_path: Path) -> None:
    _, fast, queries = build()
    fast.save(tmp_path)
    opened = Index.load(tmp_path)
    assert opened.search(queries, 9, model=MODEL) == fast.search(queries, 9, model=MODEL)
    opened.remove(["5"]).save(tmp_path)
    assert len(list(tmp_path.glob("*.lists.safetensors"))) == 1
    assert Index.load(tmp_path).inverted.count == 2999


def test_refuses_lists_that_do_not_fit() -> None:
    _, fast, _ = build()
    tensors = fast.inverted.tensors()
    for name, wrong in {
        "rows": tensors["rows"] + 1,
        "sizes": tensors["sizes"] + 1,
        "codes": tensors["codes"][:, 1:],
    }.items():
        with pytest.raises(ValueError, match="lists of 3000 rows whose tensors do not fit"):
            Inverted.of(tensors | {name: wrong})


def test_the_number_of_lists_can_be_trained() -> None:
    assert [lists_for(n) for n in (1, 100, 10_000, 1_000_000)] == [1, 2, 256, 2048]
    assert all(lists_for(n) * 39 <= n for n in (39, 5000, 123_456))


def test_without_faiss_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = Index.build(torch.randn(50, 4), {"id": [str(i) for i in range(50)]}, model=MODEL)
    with pytest.raises(ImportError, match=r"pip install 'mmformer\[search\]'"):
        index.approximate()
    assert len(index.search(torch.randn(1, 4), 3, model=MODEL)[0]) == 3
