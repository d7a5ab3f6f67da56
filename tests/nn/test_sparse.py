"""The sparse kernel is the dense one under every rule, forward and backward, at the cost of what is seen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmformer.nn import kernels
from mmformer.nn.sparse import entries, sparse
from mmformer.patterns import BigBird, Strided, Window
from mmformer.tokens import Layout, Tokens, merge, modality_id, segments, to_padded
from mmformer.visibility import Sight, Visibility
from tests.helpers import packed_tokens
from tests.nn.test_kernels import TOLERANCE, draw, run

RULES = [
    Visibility(window=0),
    Visibility(window=5),
    Visibility(window=40, causal=True),
    Visibility(window=9, sees={"text": ["text"], "image": []}),
    Visibility(patterns=Window(12, dilation=3)),
    Visibility(patterns=Window(4, first=2), causal=True),
    Visibility(patterns=Window(4, modalities=["image"])),
    Visibility(patterns=[Window(30, dilation=2), Strided(8, stride=3)]),
    Visibility(patterns=Strided(7, stride=4), causal=True),
    Visibility(patterns=Strided(5, stride=3, fixed=True)),
    Visibility(patterns=BigBird(6, random=2)),
    Visibility(patterns=BigBird(10, random=3, window=2, seed=4), causal=True),
]


def pictures(grids: dict[int, tuple[int, int]], num_samples: int, seed: int = 1) -> Tokens:
    """Pictures of rows x columns tokens, all at time 0."""
    tokens = packed_tokens({i: rows * columns for i, (rows, columns) in grids.items()}, num_samples, 4, "image", seed)
    places = [torch.cartesian_prod(torch.arange(1), *map(torch.arange, grid)) for grid in grids.values()]
    object.__setattr__(tokens, "position", torch.cat(places or [torch.zeros(0, 3, dtype=torch.long)])[None])
    return tokens


def mixed(lengths: list[int], grids: list[tuple[int, int]]) -> Tokens:
    """Texts and pictures of the same samples, in one row that ends in padding."""
    size = max(len(lengths), len(grids))
    texts = packed_tokens({i: n for i, n in enumerate(lengths) if n}, size, 4, "text", 2)
    images = pictures({i: grid for i, grid in enumerate(grids) if grid[0]}, size)
    return merge([images, texts], multiple=8)


def text(length: int) -> Tokens:
    return packed_tokens({0: length}, 1, 4)


def check(query: Tokens, key: Tokens, rule: Visibility, dtype: torch.dtype = torch.float32) -> None:
    sight = Sight(rule, query, key)
    q, k, v = draw(query, key, dtype=dtype)
    for got, expected in zip(run(sparse, q, k, v, sight), run(kernels.dense, q, k, v, sight), strict=True):
        torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sparse_is_dense_forward_and_backward(rule, padded, dtype):
    tokens = mixed([70, 0, 3, 1, 150], [(2, 3), (9, 10), (0, 0)])
    tokens = to_padded(tokens) if padded else tokens
    check(tokens, tokens, rule, dtype)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(RULES),
    st.lists(st.sampled_from([0, 1, 2, 31, 64, 65, 100]), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=3),
    st.booleans(),
)
def test_sparse_is_dense_for_any_lengths(rule, lengths, grids, padded):
    if not sum(lengths) + sum(rows for rows, _ in grids):
        return
    tokens = mixed(lengths, grids)
    tokens = to_padded(tokens) if padded else tokens
    check(tokens, tokens, rule)


@pytest.mark.parametrize("rule", [RULES[1], RULES[2], RULES[4]], ids=str)
def test_sparse_is_dense_where_keys_are_those_of_a_context(rule):
    query, key = packed_tokens({1: 90, 0: 40, 2: 5}, 4, 4), packed_tokens({0: 50, 1: 130, 3: 4}, 4, 4, seed=2)
    check(query, key, rule)


def test_tokens_of_two_modalities_may_take_turns():
    lengths = (100, 60)
    layout = Layout((0, 1), lengths, 2)
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 2, (1, 160), generator=generator)
    place = torch.cat([torch.arange(n) for n in lengths])[None, :, None] * torch.tensor([1, 0, 0])
    tokens = Tokens(
        x=torch.zeros(1, 160, 4),
        modality=torch.where(kind == 1, modality_id("text"), modality_id("audio")),
        position=place,
        segment=segments(layout, 160, torch.device("cpu")),
        layout=layout,
    )
    check(tokens, tokens, Visibility(window=7, causal=True))


def test_a_row_without_tokens_and_one_of_padding_give_nothing():
    empty = to_padded(mixed([1], []))
    object.__setattr__(empty, "segment", torch.full_like(empty.segment, -1))
    out, *gradients = run(sparse, *draw(empty, empty), Sight(RULES[1], empty, empty))
    assert out.abs().max() == 0
    assert all(g.abs().max() == 0 for g in gradients)


def test_autocast_is_heeded():
    tokens = text(40)
    q, k, v = draw(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse(q, k, v, Sight(RULES[1], tokens, tokens))
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), (q, k, v)))


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        (Visibility(window=256), 641),
        (Visibility(window=256, causal=True), 385),
        (Visibility(patterns=Window(256, dilation=4)), 4 * 33 * 2),
        (Visibility(patterns=Window(128, first=1)), 400),
        (Visibility(patterns=BigBird(64, random=3)), 8.1 * 64 + 2 * 64),
    ],
    ids=str,
)
def test_scores_grow_with_the_length_and_not_with_its_square(rule, most):
    short, long = (entries(Sight(rule, tokens, tokens)) for tokens in (text(4096), text(8192)))
    assert long / 8192 < most
    assert long / short < 2.1


def test_a_window_over_a_picture_computes_a_square_around_each_patch():
    tokens = pictures({0: (64, 64)}, 1)
    computed = entries(Sight(Visibility(window=8), tokens, tokens)) / 4096
    assert computed < 2.1 * 17**2  # of 4096, and 17 x 64 in whole rows


def test_attention_takes_the_sparse_kernel_where_it_pays(monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, "sparse", lambda *args: calls.append(1) or sparse(*args))
    for tokens, rule, taken in [
        (text(1600), Visibility(window=64), 1),
        (to_padded(text(1600)), Visibility(window=64), 1),
        (text(1600), Visibility(window=1200), 0),
        (text(1600), Visibility(causal=True), 0),
        (text(100), Visibility(window=4), 0),
    ]:
        calls.clear()
        q, k, v = (t.detach() for t in draw(tokens, tokens))
        kernels.attend(q, k, v, Sight(rule, tokens, tokens))
        assert len(calls) == taken


@pytest.mark.parametrize("one", RULES, ids=str)
def test_a_rule_is_the_same_as_a_mask_for_flex_and_joined_with_others(one):
    tokens = mixed([70, 0, 3], [(2, 3), (9, 10)])
    mask = Sight(one, tokens, tokens).dense[0, 0]
    every = torch.arange(len(mask))
    flex = Sight(one, tokens, tokens).mask_mod()(*torch.zeros(2, 1, 1).long(), every[:, None], every)
    assert torch.equal(flex, mask)
    for other in RULES:
        both = Sight(one & other, tokens, tokens).dense[0, 0]
        assert torch.equal(both, mask & Sight(other, tokens, tokens).dense[0, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(-1), "window is -1"),
        (lambda: Window(4, dilation=0), "dilation is 0"),
        (lambda: Strided(0, stride=3), "blocks of 0 times"),
    ],
)
def test_patterns_of_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_blocks_that_depend_on_the_length_cannot_be_asked_for_without_it():
    tokens = text(8)
    with pytest.raises(ValueError, match="not known while it is written"):
        Visibility(patterns=BigBird(4)).allows(*[tokens.modality, tokens.position] * 2)


def test_random_blocks_are_distinct_others_and_differ_by_seed():
    blocks, count = torch.arange(1, 29), torch.full((28,), 30)
    found = {seed: [BigBird(8, seed=seed).random_block(blocks, count, turn) for turn in range(3)] for seed in (0, 1)}
    for i, own in enumerate(blocks.tolist()):
        chosen = [int(turn[i]) for turn in found[0]]
        assert len(set(chosen)) == 3
        assert all(0 < block < 29 and abs(block - own) > 1 for block in chosen)
    assert any((a != b).any() for a, b in zip(found[0], found[1], strict=True))
