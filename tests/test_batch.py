import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmformer.batch import Batch, Ragged

SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=8)


def ragged(shapes, rows=None):
    items = [torch.randn(*shape, 3) for shape in shapes]
    return items, Ragged.stack(items, rows or list(range(len(items))), 1)


@given(SHAPES)
def test_every_item_comes_back_with_its_row(shapes):
    items, stacked = ragged(shapes)
    back = dict(stacked.items())
    assert len(back) == len(items)
    for row, item in enumerate(items):
        assert torch.equal(back[row], item)
    assert [group.shape[1:3] for group in stacked.groups()] == list(
        dict.fromkeys(torch.Size(shape) for shape in stacked.shapes)
    )


@given(SHAPES, st.data())
def test_keeping_rows_renumbers_them(shapes, data):
    items, stacked = ragged(shapes)
    chosen = data.draw(st.lists(st.sampled_from(range(len(items))), unique=True))
    kept = stacked.keep({row: new for new, row in enumerate(chosen)})
    back = {} if kept is None else dict(kept.items())
    assert set(back) == set(range(len(chosen)))
    for new, row in enumerate(chosen):
        assert torch.equal(back[new], items[row])


def test_groups_share_memory_with_the_whole():
    _, stacked = ragged([(2, 2), (1, 3), (2, 2)])
    next(stacked.groups())[...] = 7
    assert (stacked.values[:3] == 7).all()


def test_a_row_for_each_item_is_asked_for():
    with pytest.raises(ValueError, match="2 items but 1 rows"):
        Ragged.stack([torch.zeros(1), torch.zeros(1)], [0])


def test_selecting_samples_keeps_targets_ids_and_counters():
    _, pictures = ragged([(1, 2), (2, 2)], rows=[0, 2])
    batch = Batch(ids=("a", "b", "c"), inputs={"image": pictures}, targets={"label": torch.tensor([5, 6, 7])},
                  indices=(10, 11, 12))  # fmt: skip
    assert batch.present() == (frozenset({"image"}), frozenset(), frozenset({"image"}))
    some = batch.select([2, 1])
    assert (some.ids, some.targets["label"].tolist(), some.indices) == (("c", "b"), [7, 6], (12, 11))
    assert some.inputs["image"].rows == (0,)
    assert batch.select([1]).inputs == {}
    assert batch.only(["text"]).inputs == {}
    assert batch.to(torch.float64).inputs["image"].values.dtype == torch.float64


@given(SHAPES, st.data())
def test_places_follow_their_items(shapes, data):
    items = [torch.randn(*shape, 3) for shape in shapes]
    places = data.draw(st.permutations(range(len(items))))
    stacked = Ragged.stack(items, list(range(len(items))), 1, places)
    assert {row: place for row, place in zip(stacked.rows, stacked.places, strict=True)} == dict(enumerate(places))
    kept = stacked.keep({row: row for row in range(0, len(items), 2)})
    assert kept is not None
    assert dict(zip(kept.rows, kept.places, strict=True)) == {row: places[row] for row in range(0, len(items), 2)}


def test_a_place_for_each_item_or_none_is_asked_for():
    with pytest.raises(ValueError, match="2 items but 1 places"):
        Ragged.stack([torch.zeros(1), torch.zeros(1)], [0, 0], 0, [3])
