import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmformer.objectives.queue import Queue


@given(st.integers(1, 7), st.lists(st.integers(0, 9), max_size=6))
def test_it_holds_the_last_rows_whatever_their_number(size, counts):
    queue = Queue(2, size)
    kept = [(tuple(row), -100) for row in queue.rows.tolist()]
    number = 0.0
    for count in counts:
        rows = torch.arange(number, number + count)[:, None].expand(-1, 2)
        number += count
        queue.add(rows, rows[:, 0].long())
        kept = (kept + [((float(i),) * 2, int(i)) for i in rows[:, 0].tolist()])[-size:]
    assert sorted(zip(map(tuple, queue.rows.tolist()), queue.ids.tolist(), strict=True)) == sorted(kept)


def test_it_starts_with_random_unit_rows_that_depend_on_the_seed_alone():
    one, other = Queue(5, 100, seed=3), Queue(5, 100, seed=4)
    torch.testing.assert_close(one.rows.norm(dim=1), torch.ones(100))
    torch.manual_seed(9)
    assert torch.equal(Queue(5, 100, seed=3).rows, one.rows)
    assert not torch.equal(one.rows, other.rows)


def test_it_is_part_of_a_checkpoint():
    queue = Queue(2, 3)
    queue.add(torch.ones(2, 2), torch.tensor([4, 5]))
    again = Queue(2, 3, seed=1)
    again.load_state_dict(queue.state_dict())
    for part in (queue, again):
        part.add(2 * torch.ones(2, 2), torch.tensor([6, 7]))
    assert torch.equal(again.rows, queue.rows)
    assert again.ids.tolist() == queue.ids.tolist() == [7, 5, 6]


def test_no_room_is_an_error():
    with pytest.raises(ValueError, match="a queue of 0 rows"):
        Queue(2, 0)
