from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmformer.tokens import Layout, Tokens, find, merge, modality_id, segments, to_packed, to_padded
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


def placed(items, num_samples, modality, seed, tick=False):
    """Packed tokens of items (sample, place, length), in that order; with `tick` each takes one moment."""
    generator = torch.Generator().manual_seed(seed)
    samples, places, lengths = zip(*items, strict=True) if items else ((), (), ())
    layout = Layout(samples, lengths, num_samples, places)
    position = torch.zeros(1, layout.total, 3, dtype=torch.long)
    position[0, :, 1 if tick else 0] = torch.cat([torch.arange(n) for n in lengths] or [torch.arange(0)])
    return Tokens(
        x=torch.randn(1, layout.total, 4, generator=generator),
        modality=torch.full((1, layout.total), modality_id(modality)),
        position=position,
        segment=segments(layout, layout.total, torch.device("cpu")),
        layout=layout,
    )


@st.composite
def interleaved(draw):
    """For each of four samples a sequence of (modality, length), and the same by modality in any order."""
    samples = [
        draw(st.lists(st.tuples(st.sampled_from(["text", "image", "audio"]), st.integers(1, 4)), max_size=5))
        for _ in range(4)
    ]
    items = [(s, place, *item) for s, sequence in enumerate(samples) for place, item in enumerate(sequence)]
    return samples, draw(st.permutations(items))


@given(interleaved(), st.booleans())
def test_items_stand_by_their_places_and_time_runs_through_them(drawn, prefixed):
    samples, items = drawn
    names = ("text", "image", "audio")
    streams = [
        placed([(s, p, n) for s, p, m, n in items if m == name], 4, name, seed, tick=name == "image")
        for seed, name in enumerate(names)
    ]
    front = [packed_tokens({0: 2, 1: 2, 2: 2, 3: 2}, 4, 4, "latent")] if prefixed else []
    merged = merge([*streams, *front], sequential=True)  # what has no place comes first, wherever it stands here
    for sample, sequence in enumerate(samples):
        x, modality, time = (
            [rows_of(front[0], sample)] if front else [],
            [modality_id("latent")] * 2 * prefixed,
            [0, 1] * prefixed,
        )
        for place, (name, length) in enumerate(sequence):
            stream = streams[names.index(name)]
            item = list(zip(stream.layout.samples, stream.layout.places, strict=True)).index((sample, place))
            x.append(stream.x[0, stream.layout.offsets[item] : stream.layout.offsets[item + 1]])
            modality += [modality_id(name)] * length
            start = time[-1] + 1 if time else 0
            time += [start] * length if name == "image" else list(range(start, start + length))
        mine = merged.sample()[0] == sample
        assert merged.modality[0, mine].tolist() == modality
        assert merged.position[0, mine, 0].tolist() == time
        torch.testing.assert_close(merged.x[0, mine], torch.cat(x) if x else torch.empty(0, 4), rtol=0, atol=0)
        torch.testing.assert_close(to_padded(merged).x[sample, : len(time)], merged.x[0, mine], rtol=0, atol=0)


@given(LENGTHS, LENGTHS, st.booleans())
def test_places_in_the_order_of_the_streams_change_nothing(first, second, sequential):
    plain = [packed_tokens(first, 6, 4, "text", 0), packed_tokens(second, 6, 4, "image", 1)]
    ordered = [
        replace(t, layout=replace(t.layout, places=(place,) * len(t.layout.samples))) for place, t in enumerate(plain)
    ]
    one, other = merge(plain, sequential=sequential), merge(ordered, sequential=sequential, multiple=8)
    assert one.layout == other.layout
    width = one.x.shape[1]
    for field in ("x", "modality", "position", "segment"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field)[:, :width], rtol=0, atol=0)


@given(interleaved(), st.sampled_from(["packed", "padded", "own"]))
def test_tokens_are_found_where_they_stand(drawn, form):
    _, items = drawn
    streams = {
        name: placed([(s, p, n) for s, p, m, n in items if m == name], 4, name, seed)
        for seed, name in enumerate(("text", "image"))
    }
    merged = merge(list(streams.values()), multiple=5)
    for name, stream in streams.items():
        tokens = {"packed": merged, "padded": to_padded(merged), "own": stream}[form]
        where, token = find(tokens, name, stream.layout)
        assert torch.equal(where, where.sort().values)
        assert sorted(token.tolist()) == list(range(stream.layout.total))
        torch.testing.assert_close(tokens.x.flatten(0, 1)[where], stream.x[0, torch.from_numpy(token)], rtol=0, atol=0)


def test_a_packed_sample_of_several_items_is_padded_in_their_order():
    tokens = placed([(0, 2, 3), (1, 0, 1), (0, 1, 2)], 2, "text", 0)
    padded = to_padded(tokens)
    torch.testing.assert_close(padded.x[0], torch.cat([tokens.x[0, 4:], tokens.x[0, :3]]), rtol=0, atol=0)
