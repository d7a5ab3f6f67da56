import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmformer.tokens import Layout, merge, modality_id, to_packed, to_padded
from tests.helpers import packed_tokens

LENGTHS = st.dictionaries(st.integers(0, 5), st.integers(1, 7), max_size=6)


def rows_of(tokens, sample):
    """The slow form: the tokens of one sample, in row order."""
    return tokens.x[0][(tokens.sample()[0] == sample)]


@given(LENGTHS, LENGTHS, st.integers(1, 16))
def test_merge_joins_what_each_sample_has_in_stream_order(first, second, multiple):
    a = packed_tokens(first, 6, 4, "text", 0)
    b = packed_tokens(second, 6, 4, "image", 1)
    merged = merge([a, b], multiple=multiple)
    assert merged.x.shape[1] % multiple == 0
    for sample in range(6):
        expected = torch.cat([rows_of(a, sample), rows_of(b, sample)])
        torch.testing.assert_close(rows_of(merged, sample), expected, rtol=0, atol=0)
    assert merged.layout is not None
    assert list(merged.layout.lengths) == sorted(merged.layout.lengths)
    assert int((merged.segment >= 0).sum()) == sum(first.values()) + sum(second.values())


@given(LENGTHS.filter(bool))
def test_padded_and_back_is_the_same_row_set(lengths):
    tokens = packed_tokens(lengths, 6, 4)
    padded = to_padded(tokens)
    assert padded.x.shape[:2] == (6, max(lengths.values()))
    assert padded.x[~padded.valid].abs().sum() == 0
    again = to_packed(padded, [lengths.get(sample, 0) for sample in range(6)])
    for sample in range(6):
        torch.testing.assert_close(rows_of(again, sample), rows_of(tokens, sample), rtol=0, atol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_sequential_time_runs_through_the_streams(padded):
    picture = packed_tokens({0: 4, 1: 2}, 3, 4, "image")
    object.__setattr__(picture, "position", picture.position * 0)  # a picture takes one tick
    text = packed_tokens({1: 3, 2: 2, 0: 3}, 3, 4, "text")
    streams = [to_padded(t) for t in (picture, text)] if padded else [picture, text]
    merged = merge(streams, sequential=True)
    sample, word = merged.sample(), merged.modality == modality_id("text")
    times = {s: merged.position[..., 0][(sample == s) & word].tolist() for s in range(3)}
    assert times == {0: [1, 2, 3], 1: [1, 2, 3], 2: [0, 1]}


def test_order_is_kept_for_a_context_that_must_follow_the_stream():
    merged = merge([packed_tokens({0: 5, 1: 1, 2: 3}, 3, 4)], order=[0, 2, 1])
    assert merged.layout == Layout((0, 2, 1), (5, 3, 1), 3)


def test_streams_of_two_layouts_or_batches_are_refused():
    packed = packed_tokens({0: 2, 1: 3}, 2, 4)
    with pytest.raises(ValueError, match="1 of 2 streams are packed"):
        merge([packed, to_padded(packed)])
    with pytest.raises(ValueError, match=r"streams of \[2, 3\] samples"):
        merge([packed, packed_tokens({0: 2}, 3, 4)])
