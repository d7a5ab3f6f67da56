import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmformer.losses.matching import (
    excluded,
    floored,
    masked,
    matching_loss,
    pair_noise,
    sample_negatives,
    similarity,
    zeroed,
)

DRAWS = 40_000
CRITICAL = {3: 16.27, 4: 18.47, 5: 20.52}
"""Of chi-square at 0.001, by degrees of freedom."""


def scores(rows: int = 1, keys: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, keys, generator=torch.Generator().manual_seed(seed))


def same_as(keys: int, *places: int) -> torch.Tensor:
    return torch.zeros(1, keys, dtype=torch.bool).index_fill(1, torch.tensor(places), True)


def by_hand(variant, row: list[float], same: list[bool]) -> list[float]:
    """The probability of each key, as the published code has it, in plain loops."""
    total = sum(math.exp(x) for x in row)
    if variant in (zeroed, floored):
        floor = 1e-4 if variant is floored else 0.0
        weights = [0.0 if s else math.exp(x) / total + floor for x, s in zip(row, same, strict=True)]
    else:
        weights = [0.0 if s else math.exp(x) for x, s in zip(row, same, strict=True)]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("variant", [zeroed, floored, excluded, masked])
@pytest.mark.parametrize("places", [(2,), (0, 3)])
def test_negatives_come_as_often_as_the_published_weights_say(variant, places):
    row, same = 1.5 * scores(), same_as(6, *places)
    wanted = by_hand(variant, row[0].tolist(), same[0].tolist())
    noise = pair_noise(7, torch.arange(DRAWS), torch.arange(6))
    drawn = sample_negatives(variant(row, same).expand(DRAWS, -1), noise)
    counts = torch.bincount(drawn, minlength=6).tolist()
    assert all(counts[place] == 0 for place in places)
    chi = sum((n - DRAWS * p) ** 2 / (DRAWS * p) for n, p in zip(counts, wanted, strict=True) if p)
    assert chi < CRITICAL[6 - len(places) - 1]


@given(st.integers(2, 7), st.integers(0, 1000), st.sampled_from([zeroed, floored, excluded, masked]))
def test_what_shows_the_same_is_never_drawn(size, seed, variant):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, size, (size,), generator=generator)
    ids[:2] = torch.tensor([0, 1])  # two things at least
    same = ids[:, None] == ids
    weights = variant(scores(size, size, seed) * 3, same)
    drawn = sample_negatives(weights, pair_noise(seed, torch.arange(size), torch.arange(size)))
    assert not same[torch.arange(size), drawn].any()


@pytest.mark.parametrize("variant", [zeroed, floored, excluded, masked])
def test_a_batch_of_one_is_an_error(variant):
    with pytest.raises(ValueError, match=r"1 of 1 rows have no negative among 1 candidates.*batch_size"):
        sample_negatives(variant(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)), torch.full((1, 1), 0.5))


def test_only_a_softmax_over_all_keys_can_lose_every_negative():
    row, same = torch.tensor([[900.0, 0.0, 1.0]]), same_as(3, 0)
    noise = torch.full((1, 3), 0.5)
    with pytest.raises(ValueError, match="`excluded`"):
        sample_negatives(zeroed(row, same), noise)
    for variant in (floored, excluded, masked):
        assert sample_negatives(variant(row, same), noise) != 0


def test_noise_depends_on_the_numbers_of_a_pair_and_not_on_where_they_stand():
    rows, keys = torch.tensor([11, 5, 90]), torch.tensor([5, 8, 11, 3])
    noise = pair_noise(3, rows, keys)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(pair_noise(3, rows.flip(0), keys[order]), noise.flip(0)[:, order])
    assert not torch.equal(pair_noise(4, rows, keys), noise)
    many = pair_noise(0, torch.arange(300), torch.arange(300))
    assert len(many.unique()) == many.numel()
    assert float(many.min()) > 0
    assert float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.005
    assert abs(float(many.var()) - 1 / 12) < 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_is_that_of_the_best_of_several_vectors(dtype):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 3 * 5, generator=generator).to(dtype).requires_grad_()
    texts = torch.randn(6, 5, generator=generator).to(dtype).requires_grad_()
    rows, columns = queries.double().view(4, 3, 5), texts.double()
    best = [[max((q @ t for q in row), key=lambda x: float(x.detach())) for t in columns] for row in rows]
    wanted = torch.stack([torch.stack(row) for row in best])
    weight = torch.randn(4, 6, generator=generator)
    expected = torch.autograd.grad((wanted * weight).sum(), [queries, texts])
    for got, w in ((similarity(queries, texts), weight), (similarity(texts, queries).T, weight)):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad((got * w).sum(), [queries, texts])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_similarity_keeps_single_precision_under_autocast():
    a = F.normalize(scores(3, 8), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(similarity(a, a).diagonal(), torch.ones(3), rtol=0, atol=1e-6)


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="of 6 and of 4 channels"):
        similarity(torch.ones(2, 6), torch.ones(2, 4))


def test_the_loss_is_the_cross_entropy_of_each_pair():
    logits, matches = scores(5, 2).requires_grad_(), torch.tensor([True, True, False, False, True])
    total = torch.zeros(())
    for row, match in zip(logits, matches.tolist(), strict=True):
        total = total - (row[int(match)] - torch.log(torch.exp(row[0]) + torch.exp(row[1])))
    torch.testing.assert_close(matching_loss(logits, matches), total, rtol=1e-6, atol=1e-6)
