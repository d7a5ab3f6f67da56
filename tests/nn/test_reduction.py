"""Fewer tokens: as a plain loop over segments merges and drops them, packed as padded, with gradients."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmformer.nn import Attention, Block, Shrinking, TokenMerging, TokenPruning, Transformer
from mmformer.tokens import to_padded
from mmformer.visibility import Visibility
from tests.helpers import packed_tokens, scramble

LAYER = partial(Block, attention=partial(Attention, num_heads=2))
LENGTHS = st.lists(st.integers(1, 11), min_size=1, max_size=4)


def tokens_of(lengths, seed=0, dim=8):
    return packed_tokens(dict(enumerate(lengths)), len(lengths), dim, seed=seed)


def merged(x, sizes, share, prefix):
    """ToMe on one sequence, step by step: vectors, sizes and old places of the tokens that stay."""
    cells = range(prefix, len(x))
    giving, taking = list(cells)[::2], list(cells)[1::2]
    going = min(int(len(cells) * share + 1e-9), len(cells) // 2)
    total, count = [a * s for a, s in zip(x, sizes, strict=True)], list(sizes)
    best = []
    for a in giving:
        scores = [torch.cosine_similarity(x[a], x[b], dim=0).item() for b in taking]
        if scores:
            best.append((max(scores), a, taking[scores.index(max(scores))]))
    gone = set()
    for _, a, b in sorted(best, reverse=True)[:going]:
        total[b], count[b] = total[b] + total[a], count[b] + count[a]
        gone.add(a)
    stay = [i for i in range(len(x)) if i not in gone]
    return torch.stack([total[i] / count[i] for i in stay]), torch.stack([count[i] for i in stay]), stay


@given(LENGTHS, st.sampled_from([0.0, 0.2, 0.37, 0.5]), st.sampled_from([0, 1, 3]))
@settings(max_examples=40, deadline=None)
def test_merging_is_that_of_the_paper_on_every_segment(lengths, share, prefix):
    tokens = tokens_of(lengths)
    sizes = torch.rand(1, sum(lengths)) + 1
    found, counts = TokenMerging(share, prefix).reduce(tokens, sizes)
    x, own, position = [], [], []
    for part, size in zip(tokens.x[0].split(lengths), sizes[0].split(lengths), strict=True):
        vectors, count, places = merged(part, size, share, prefix)
        x.append(vectors), own.append(count), position.extend(places)
    torch.testing.assert_close(found.x[0], torch.cat(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(counts[0], torch.cat(own), rtol=1e-5, atol=1e-5)
    assert found.position[0, :, 0].tolist() == position
    assert found.layout.lengths == tuple(map(len, x))


REDUCTIONS = {
    "merging": lambda: TokenMerging(0.4, prefix=1),
    "pruning": lambda: scramble(TokenPruning(8, 0.6, prefix=1)),
    "shrinking": lambda: scramble(Shrinking(8, 3, [LAYER], reduction=TokenMerging(0.3))),
    "shrinking by score": lambda: scramble(Shrinking(8, 3, [LAYER], reduction=TokenPruning(8, 0.3))),
}


@pytest.mark.parametrize("kind", list(REDUCTIONS))
@given(LENGTHS)
@settings(max_examples=20, deadline=None)
def test_packed_is_padded_and_samples_do_not_mix(kind, lengths):
    stage, tokens = REDUCTIONS[kind](), tokens_of(lengths)
    found = stage(tokens)
    padded = stage(to_padded(tokens))
    assert padded.x.shape[1] == max(found.layout.lengths), "a full row says how wide it gets"
    again = to_padded(found)
    torch.testing.assert_close(again.x, torch.where(padded.valid[..., None], padded.x, 0), rtol=1e-5, atol=1e-5)
    assert torch.equal(again.segment, padded.segment)
    for row, (part, x) in enumerate(
        zip(found.x[0].split(found.layout.lengths), tokens.x[0].split(lengths), strict=True)
    ):
        alone = tokens_of([len(x)])
        torch.testing.assert_close(stage(alone.with_x(x[None])).x[0], part, rtol=1e-5, atol=1e-5, msg=f"row {row}")


@pytest.mark.parametrize("kind", list(REDUCTIONS))
def test_gradients_reach_what_is_left_and_the_score(kind):
    stage, tokens = REDUCTIONS[kind](), tokens_of([7, 4, 1])
    x = tokens.x.double().requires_grad_()
    stage = stage.double()
    assert torch.autograd.gradcheck(lambda x: stage(tokens.with_x(x)).x, [x], eps=1e-6, atol=1e-4, nondet_tol=1e-9)
    stage(tokens.with_x(x)).x.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in stage.named_parameters() if "score.w" in n)


def test_pruning_keeps_the_tokens_of_the_highest_score():
    stage, tokens = scramble(TokenPruning(8, 0.5, prefix=1)), tokens_of([9])
    score = stage.score(tokens.x)[0, :, 0]
    places = [0, *sorted((1 + score[1:].topk(4).indices).tolist())]
    found = stage(tokens)
    assert found.position[0, :, 0].tolist() == places
    weight = torch.cat([torch.ones(1), 2 * score[places[1:]].sigmoid()])
    torch.testing.assert_close(found.x[0], tokens.x[0, places] * weight[:, None])


def test_nothing_goes_at_a_share_of_nothing_and_weights_fit_a_plain_transformer():
    plain = scramble(Transformer(8, 3, [LAYER]))
    shrinking = Shrinking(8, 3, [LAYER], reduction=TokenMerging(0.0))
    shrinking.load_state_dict(plain.state_dict())
    tokens = tokens_of([6, 2, 9])
    torch.testing.assert_close(shrinking(tokens).x, plain(tokens).x, rtol=1e-5, atol=1e-5)


def test_the_row_really_gets_shorter():
    stage = Shrinking(8, 4, [LAYER], reduction=TokenMerging(0.5))
    lengths = []
    for layer in stage.layers:
        layer.register_forward_hook(lambda _, given, __: lengths.append(given[0].x.shape[1]))
    stage(tokens_of([16, 8]))
    assert lengths == [24, 12, 6, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_at_all_and_half_precision(dtype):
    for make in REDUCTIONS.values():
        stage = make().to(dtype)
        tokens = tokens_of([5, 3])
        assert stage(tokens.with_x(tokens.x.to(dtype))).x.dtype == dtype
        nothing = packed_tokens({}, 2, 8)
        assert stage(nothing.with_x(nothing.x.to(dtype))).x.shape == (1, 0, 8)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"share 0.6: .*half"):
        TokenMerging(0.6)
    with pytest.raises(ValueError, match="share 1"):
        TokenPruning(8, 1.0)
    tokens = tokens_of([4])
    shrinking = Shrinking(8, 2, [LAYER], reduction=TokenMerging(0.5))
    for given_too in ({"context": tokens}, {"visibility": Visibility(causal=True)}):
        with pytest.raises(ValueError, match="reduce in an encoder"):
            shrinking(tokens, **given_too)
