"""An index finds what a plain product and sort find, whatever was added, removed, filtered or saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from mmformer.search import Hit, Index, average
from mmformer.search import index as index_module
from mmformer.search.nearest import NONE
from mmformer.search.storage import MANIFEST

MODEL = "0123:shared"


def rows(start: int, count: int) -> dict[str, list[object]]:
    return {
        "id": [f"r{i}" for i in range(start, start + count)],
        "colour": [("red", "green", "blue")[i % 3] for i in range(start, start + count)],
        "size": list(range(start, start + count)),
    }


def built(count: int = 40, dim: int = 6, half: bool = False) -> tuple[Index, Tensor]:
    vectors = 5 * torch.randn(count, dim)
    return Index.build(vectors, rows(0, count), model=MODEL, half=half), normalize(vectors, dim=1)


def plain(vectors: Tensor, queries: Tensor, k: int, kept: Sequence[int]) -> list[list[str]]:
    scores = normalize(queries, dim=1) @ vectors[list(kept)].T
    return [[f"r{kept[i]}" for i in row[:k]] for row in scores.argsort(1, descending=True).tolist()]


def ids(found: list[list[Hit]]) -> list[list[str]]:
    return [[hit.id for hit in hits] for hits in found]


@settings(max_examples=25)
@given(
    st.integers(1, 30),
    st.integers(1, 12),
    st.booleans(),
    st.integers(1, 9),
    st.sampled_from([None, "red", ["red", "blue"]]),
)
def test_equals_a_plain_sort(count: int, k: int, half: bool, block: int, colours: str | list[str] | None) -> None:
    torch.manual_seed(count * 100 + k)
    index, vectors = built(count, half=half)
    extra = torch.randn(7, 6)
    index = index.add(extra, rows(count, 7), model=MODEL)
    vectors = torch.cat([vectors, normalize(extra, dim=1)]).to(index.parts[0].vectors.dtype).float()
    queries = torch.randn(3, 6)
    wanted = [colours] if isinstance(colours, str) else colours
    kept = [i for i in range(count + 7) if wanted is None or ("red", "green", "blue")[i % 3] in wanted]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "BLOCK", 6 * block)
        patch.setattr(index_module, "QUERIES", 2)
        found = index.search(queries, k, model=MODEL, where=None if colours is None else {"colour": colours})
    assert ids(found) == plain(vectors, queries, k, kept)
    for query, hits in zip(normalize(queries, dim=1), found, strict=True):
        for hit in hits:
            assert hit.score == pytest.approx(float(query @ vectors[int(hit.id[1:])]), abs=1e-5)


def test_a_hit_holds_its_row() -> None:
    index, vectors = built()
    (hit,) = index.search(vectors[4:5], 1, model=MODEL)[0]
    assert hit.row == {"id": "r4", "colour": "green", "size": 4, "modality": ""}
    assert hit.score == pytest.approx(1)


def test_filters_read_values_as_the_column_does() -> None:
    index, vectors = built()
    assert ids(index.search(vectors[:1], 3, model=MODEL, where={"size": "7"})) == [["r7"]]
    assert ids(index.search(vectors[:1], 3, model=MODEL, where={"size": 7, "colour": "red"})) == [[]]
    with pytest.raises(ValueError, match="no column 'shape' to filter by; this index has id, colour, size, modality"):
        index.search(vectors[:1], 3, model=MODEL, where={"shape": "round"})
    with pytest.raises(ValueError, match="filter size=large: the column holds int64"):
        index.search(vectors[:1], 3, model=MODEL, where={"size": "large"})


def test_removing_is_never_having_added() -> None:
    index, vectors = built(30)
    index = index.add(torch.randn(5, 6), rows(30, 5), model=MODEL)
    fewer = index.remove(["r3", "r4", "r29", *(f"r{i}" for i in range(30, 35))])
    assert len(fewer) == 27
    assert len(fewer.parts) == 1
    kept = [i for i in range(29) if i not in (3, 4)]
    assert ids(fewer.search(vectors, 5, model=MODEL)) == plain(vectors, vectors, 5, kept)
    assert len(index) == 35
    assert len(fewer.add(vectors[3:4], rows(3, 1), model=MODEL)) == 28
    with pytest.raises(ValueError, match="1 ids are not in the index, such as 'r99'"):
        index.remove(["r1", "r99"])
    with pytest.raises(ValueError, match="all 35 rows would be removed"):
        index.remove([f"r{i}" for i in range(35)])


def test_reranking_sees_the_depth_and_keeps_the_best() -> None:
    index, vectors = built()
    seen = []

    def smallest_first(query: int, hits: Sequence[Hit]) -> list[float]:
        seen.append((query, len(hits)))
        return [-float(hit.row["size"]) for hit in hits]

    found = index.search(vectors[:2], 2, model=MODEL, rerank=smallest_first, depth=9)
    assert seen == [(0, 9), (1, 9)]
    for query, hits in enumerate(found):
        nine = index.search(vectors[query : query + 1], 9, model=MODEL)[0]
        assert [hit.row["size"] for hit in hits] == sorted(hit.row["size"] for hit in nine)[:2]
        assert hits[0].score == -hits[0].row["size"]
    with pytest.raises(ValueError, match="gave 1 scores for 9 hits"):
        index.search(vectors[:1], 2, model=MODEL, rerank=lambda query, hits: [0.0], depth=9)


def test_refuses_vectors_of_another_model() -> None:
    index, vectors = built()
    for use in (
        lambda: index.search(vectors, model="4567:shared"),
        lambda: index.add(vectors, rows(40, 40), model="4567:shared"),
    ):
        with pytest.raises(ValueError, match=r"vectors of the model 0123:shared, these are of 4567:shared: embed with"):
            use()
    with pytest.raises(ValueError, match="vectors of 5 numbers, this index has vectors of 6"):
        index.search(vectors[:, :5], model=MODEL)


def test_refuses_what_cannot_be_found_again() -> None:
    index, vectors = built()
    with pytest.raises(ValueError, match="2 of the rows are in the index already, such as id 'r38'"):
        index.add(vectors[:4], rows(38, 4), model=MODEL)
    with pytest.raises(ValueError, match=r"id 'a' \(image\) stands in 2 rows"):
        Index.build(vectors[:2], {"id": ["a", "a"], "modality": ["image", "image"]}, model=MODEL)
    with pytest.raises(ValueError, match="3 rows and 2 vectors"):
        Index.build(vectors[:2], rows(0, 3), model=MODEL)
    with pytest.raises(ValueError, match="the columns name: one must be called 'id'"):
        Index.build(vectors[:2], {"name": ["a", "b"]}, model=MODEL)
    with pytest.raises(ValueError, match="these rows do not fit"):
        index.add(vectors[:1], {"id": ["x"], "size": ["large"]}, model=MODEL)
    for value in (torch.nan, 0.0, torch.inf):
        with pytest.raises(ValueError, match="vector 1 is zero, infinite or NaN"):
            Index.build(torch.stack([vectors[0], vectors[0] * value]), rows(0, 2), model=MODEL)
    assert len(Index.build(vectors[:2], {"id": ["a", "a"], "modality": ["image", "text"]}, model=MODEL)) == 2


@pytest.mark.parametrize("half", [False, True])
def test_loads_what_was_saved(half: bool, tmp_path: Path) -> None:
    index, vectors = built(half=half)
    index.save(tmp_path / "idx")
    opened = Index.load(tmp_path / "idx")
    assert opened.search(vectors, 7, model=MODEL) == index.search(vectors, 7, model=MODEL)
    assert opened.rows == index.rows
    assert opened.parts[0].vectors.dtype == (torch.float16 if half else torch.float32)


def test_adding_to_a_saved_index_writes_the_new_part_only(tmp_path: Path) -> None:
    index, vectors = built()
    index.save(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != MANIFEST}
    opened = Index.load(tmp_path).add(torch.randn(2, 6), rows(40, 2) | {"note": ["x", None]}, model=MODEL)
    opened.save(tmp_path)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != MANIFEST}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2
    again = Index.load(tmp_path)
    assert len(again) == 42
    assert again.search(vectors[:1], 1, model=MODEL)[0][0].row["note"] is None
    again.remove([f"r{i}" for i in range(40)]).save(tmp_path)
    assert not before.keys() & {path.name for path in tmp_path.iterdir()}


def test_a_writer_that_is_stopped_leaves_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = built()
    index.save(tmp_path)
    more = index.add(torch.randn(2, 6), rows(40, 2), model=MODEL)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in ("save_file", "pq.write_table", "json.dumps"):
        with monkeypatch.context() as patch:
            patch.setattr(f"mmformer.search.storage.{place}", stop)
            with pytest.raises(KeyboardInterrupt):
                more.save(tmp_path)
        assert len(Index.load(tmp_path)) == 40


def test_says_what_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no index: it has no manifest\.json"):
        Index.load(tmp_path)
    index, _ = built()
    index.save(tmp_path)
    vectors = next(tmp_path.glob("*.vectors.safetensors"))
    data = vectors.read_bytes()
    vectors.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"vectors\.safetensors is damaged"):
        Index.load(tmp_path)
    vectors.unlink()
    with pytest.raises(FileNotFoundError, match=r"vectors\.safetensors is missing"):
        Index.load(tmp_path)
    vectors.write_bytes(data)
    manifest = tmp_path / MANIFEST
    text = manifest.read_text()
    manifest.write_text(text.replace('"rows": 40', '"rows": 41'))
    with pytest.raises(ValueError, match=r"the manifest says \(41, 6\)"):
        Index.load(tmp_path)
    manifest.write_text(text.replace(vectors.name.split(".")[0], "../elsewhere"))
    with pytest.raises(ValueError, match="a part is named by letters and digits only"):
        Index.load(tmp_path)
    manifest.write_text("{}")
    with pytest.raises(ValueError, match="is damaged: KeyError"):
        Index.load(tmp_path)


def test_an_average_is_as_near_to_all_of_its_parts() -> None:
    one, other = torch.tensor([3.0, 0, 0]), torch.tensor([0, 0.1, 0])
    torch.testing.assert_close(average([one, other]), torch.tensor([0.5**0.5, 0.5**0.5, 0]))
    torch.testing.assert_close(average([one]), torch.tensor([1.0, 0, 0]))


def test_numbers_of_fewer_rows_than_asked_for() -> None:
    index, vectors = built(3)
    found = index.nearest(vectors, 5, model=MODEL)
    assert found.rows[:, :3].sort(1).values.tolist() == [[0, 1, 2]] * 3
    assert found.rows[:, 3:].unique().tolist() == [NONE]
    assert found.scores[:, 3:].unique().tolist() == [-torch.inf]
    assert len(index.search(vectors, 5, model=MODEL)[0]) == 3
    assert index.nearest(torch.empty(0, 6), 5, model=MODEL).rows.shape == (0, 5)
