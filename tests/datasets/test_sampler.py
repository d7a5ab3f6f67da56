"""Batches are a pure function of the seed and the epoch, whoever asks for them and from wherever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmformer.datasets.sampler import Batching, BatchSampler, counter_seed, plan


def rule(**changes) -> Batching:
    return Batching(**{"seed": 1, "batch_size": 4, "batch_tokens": None, "shuffle": True, "drop_last": False} | changes)


SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=120)


@given(SIZES, st.integers(0, 3), st.integers(1, 9))
def test_an_epoch_has_every_sample_once(sizes, epoch, batch_size):
    for changes in ({"batch_size": batch_size}, {"batch_size": None, "batch_tokens": 10 * batch_size}):
        batches = plan(sizes, epoch, rule(**changes))
        assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
        assert all(batches)


@given(SIZES, st.integers(1, 200))
def test_the_number_of_batches_is_the_same_in_every_epoch(sizes, budget):
    made = rule(batch_size=None, batch_tokens=budget)
    assert len({len(plan(sizes, epoch, made)) for epoch in range(4)}) == 1


@given(SIZES, st.integers(1, 200))
def test_a_budget_is_passed_by_less_than_one_sample(sizes, budget):
    longest = max(1, *sizes, 1)
    for batch in plan(sizes, 0, rule(batch_size=None, batch_tokens=budget)):
        assert sum(max(1, sizes[i]) for i in batch) <= budget + longest


def test_batches_of_a_budget_hold_about_equal_tokens_and_similar_lengths():
    sizes = [1 + (7 * i) % 50 for i in range(2000)]
    batches = plan(sizes, 0, rule(batch_size=None, batch_tokens=1000))
    totals = [sum(sizes[i] for i in batch) for batch in batches]
    assert max(totals) - min(totals) < 100
    spread = [max(sizes[i] for i in batch) - min(sizes[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 10


@given(SIZES, st.integers(0, 2), st.integers(1, 4))
def test_ranks_share_each_global_batch(sizes, epoch, world_size):
    made = rule()
    shares = [BatchSampler(sizes, made, rank, world_size) for rank in range(world_size)]
    for share in shares:
        share.set_epoch(epoch)
    parts = [list(share) for share in shares]
    assert {len(part) for part in parts} == {len(shares[0])}
    for step, whole in enumerate(plan(sizes, epoch, made)):
        assert sorted(index for part in parts for _, index in part[step]) == sorted(whole)


@given(st.lists(st.integers(1, 100), min_size=8, max_size=8), st.sampled_from([2, 4]))
def test_shares_are_equal_in_samples_and_balanced_in_tokens(sizes, world_size):
    made = rule(batch_size=8, shuffle=False)
    shares = [next(iter(BatchSampler(sizes, made, rank, world_size))) for rank in range(world_size)]
    assert {len(share) for share in shares} == {8 // world_size}
    totals = [sum(sizes[i] for _, i in share) for share in shares]
    assert max(totals) - min(totals) <= max(sizes)


def test_resuming_yields_the_rest_of_that_epoch_and_all_of_the_next():
    straight, resumed = (BatchSampler([1] * 30, rule()) for _ in range(2))
    straight.set_epoch(2)
    whole = list(straight)
    resumed.resume_at(2, 3)
    assert list(resumed) == whole[3:]
    assert list(resumed) == whole[3:], "a loader with workers asks for an iterator twice"
    assert len(resumed) == len(whole)
    resumed.set_epoch(3)
    straight.set_epoch(3)
    assert list(resumed) == list(straight)


def test_lightning_reaches_set_epoch_through_the_sampler_of_the_batch_sampler():
    sampler = BatchSampler([1] * 8, rule())
    sampler.sampler.set_epoch(4)
    assert next(iter(sampler))[0][0] == 4


def test_the_order_differs_by_epoch_and_by_seed_and_not_by_process():
    orders = [plan([1] * 50, epoch, rule(seed=seed)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({repr(order) for order in orders}) == 4
    assert counter_seed(0, "order", 1) == 2002067703672271585


def test_what_does_not_fill_a_batch_is_dropped_unless_it_is_all_there_is():
    assert [len(b) for b in plan([1] * 10, 0, rule(drop_last=True))] == [4, 4]
    assert [len(b) for b in plan([1] * 3, 0, rule(drop_last=True))] == [3]


@pytest.mark.parametrize("changes", [{"batch_tokens": 8}, {"batch_size": None}, {"batch_size": 0}])
def test_a_wrong_batch_is_refused(changes):
    with pytest.raises(ValueError, match=r"give one|at least 1"):
        rule(**changes)
