"""What is remembered is what would be computed anew: every kind of layer, unequal rows, several tokens at a time."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from mmformer.nn import (
    Attention,
    Block,
    ByModality,
    ContextNorm,
    CrossAttention,
    FeedForward,
    Gated,
    Learned,
    Looped,
    Memory,
    Recursive,
    RelativeBias,
    Rotary,
    Transformer,
)
from mmformer.tokens import PADDING, Layout, Tokens, latent_tokens, merge, modality_id, segments, to_padded
from mmformer.visibility import Visibility
from tests.helpers import packed_tokens, scramble

CAUSAL = Visibility(causal=True)
ATTENTION = partial(Attention, num_heads=4, num_kv_heads=2, rotary=Rotary)
CROSS = partial(CrossAttention, num_heads=2, context_dim=12)
WIDE = partial(Block, attention=ATTENTION)
LAYERS = {
    "pre-norm": [WIDE],
    "post-norm": [partial(Block, attention=ATTENTION, post_norm=True)],
    "windows": [partial(Block, attention=partial(ATTENTION, visibility=Visibility(window=w))) for w in (1, 2)] + [WIDE],
    "relative bias": [partial(Block, attention=partial(Attention, num_heads=4, kernel=RelativeBias(4, 8, 9)))],
    "looped": [partial(Looped, layers=[WIDE, WIDE], times=2)],
    "recursive": [partial(Recursive, layer=WIDE, times=2, rank=2)],
    "experts": [partial(WIDE, feedforward=partial(ByModality, part=FeedForward, modalities=["image"]))],
    "crossing": [partial(Block, attention=ATTENTION, cross=CROSS)],
    "crossing, other values": [partial(Block, attention=ATTENTION, cross=partial(CROSS, head_dim=[7, 4]))],
    "gated, crossing for some": [
        partial(Block, attention=ATTENTION, cross=partial(Gated, part=CROSS), cross_for=["text"]), WIDE,
    ],
    "context norm": [partial(Block, attention=ATTENTION, cross=partial(ContextNorm, part=CROSS, context_dim=12))],
}  # fmt: skip


def transformer(name: str, **options) -> Transformer:
    return scramble(Transformer(16, 3, LAYERS[name], visibility=CAUSAL, **options))


def cut(tokens: Tokens, start: list[int], stop: list[int]) -> Tokens:
    """Tokens start to stop of each row of a padded sequence, with padding in the middle where rows are shorter."""
    width = max(b - a for a, b in zip(start, stop, strict=True))
    place = torch.tensor(start)[:, None] + torch.arange(width)
    real = place < torch.tensor(stop)[:, None]
    place = place.clamp(max=tokens.x.shape[1] - 1)

    def take(values):
        index = place.view(*place.shape, *[1] * (values.ndim - 2)).expand(*place.shape, *values.shape[2:])
        return values.gather(1, index)

    segment = torch.where(real, take(tokens.segment), PADDING)
    return Tokens(x=take(tokens.x), modality=take(tokens.modality), position=take(tokens.position), segment=segment)


def sequences(lengths: dict[int, int]) -> Tokens:
    """Pictures, of which sample 2 has none, in front of texts."""
    image = packed_tokens({0: 2, 1: 3, 3: 1}, 4, 16, "image", seed=1)
    return merge([image, packed_tokens(lengths, 4, 16)], sequential=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_remembered_is_what_is_computed_anew(name, packed, dtype):
    model = transformer(name, repeat=2, position=partial(Learned, num_positions=32)).to(dtype)
    context = packed_tokens({1: 3, 0: 2, 3: 4}, 4, 12) if "cross" in name or "context" in name else None
    whole = to_padded(sequences({0: 6, 2: 7, 1: 5, 3: 6}))
    start = sequences({0: 2, 2: 1, 1: 1, 3: 3})  # prompts of several lengths
    whole, start, context = (t and t.with_x(t.x.to(dtype)) for t in (whole, start, context))
    begin = [4, 4, 1, 4]
    first = cut(whole, [0] * 4, begin)
    if packed:
        first = replace(start, x=to_packed_x(first, start))
    expected = model(whole, context and to_padded(context)).x
    memory, at = Memory("text"), begin
    found = model(first, context if packed else context and to_padded(context), memory=memory)
    rows = [to_padded(found).x[row, :stop] for row, stop in enumerate(at)]
    for count in ([1, 1, 1, 1], [2, 1, 1, 1], [1, 1, 3, 1], [0, 1, 0, 1]):
        stop = [a + n for a, n in zip(at, count, strict=True)]
        more = model(cut(whole, at, stop), memory=memory).x
        rows = [torch.cat([row, new[:n]]) for row, new, n in zip(rows, more, count, strict=True)]
        at = stop
    for row, stop in enumerate(at):
        torch.testing.assert_close(rows[row], expected[row, :stop], rtol=1e-5, atol=1e-5)


def to_packed_x(padded: Tokens, like: Tokens) -> torch.Tensor:
    """The vectors of padded rows as those of a packed sequence of the same tokens."""
    rows = [padded.x[sample, :length] for sample, length in zip(like.layout.samples, like.layout.lengths, strict=True)]
    return torch.cat(rows)[None]


def test_rows_are_reordered_repeated_and_dropped_with_their_context():
    model = transformer("crossing")
    context = packed_tokens({1: 3, 0: 2, 3: 4}, 4, 12)
    memory = Memory("text")
    whole = to_padded(sequences({0: 6, 2: 7, 1: 5, 3: 6}))
    model(cut(whole, [0] * 4, [4, 4, 1, 4]), to_padded(context), memory=memory)
    expected = model(whole, to_padded(context)).x
    rows = [3, 0, 0, 2]
    chosen = memory.select(rows)
    again = chosen.select([0, 2, 1, 3])  # of the same samples
    for kept in (chosen, again):
        start = [[4, 4, 1, 4][row] for row in rows]
        out = model(cut(select(whole, rows), start, [a + 1 for a in start]), memory=kept).x
        torch.testing.assert_close(out[:, 0], torch.stack([expected[r, a] for r, a in zip(rows, start, strict=True)]))
    out = model(cut(whole, [4, 4, 1, 4], [5, 5, 2, 5]), memory=memory).x  # the original is as it was
    torch.testing.assert_close(out[:, 0], torch.stack([expected[r, a] for r, a in enumerate([4, 4, 1, 4])]))
    assert again.of(model).crossed[0][0].data_ptr() == chosen.of(model).crossed[0][0].data_ptr()


def select(tokens: Tokens, rows: list[int]) -> Tokens:
    return Tokens(**{name: getattr(tokens, name)[rows] for name in ("x", "modality", "position", "segment")})


def test_what_was_read_once_is_not_computed_again():
    model = transformer("context norm")
    memory, whole = Memory("text"), to_padded(sequences({0: 6, 2: 7, 1: 5, 3: 6}))
    model(cut(whole, [0] * 4, [4, 4, 1, 4]), to_padded(packed_tokens({1: 3, 0: 2}, 4, 12)), memory=memory)
    for layer in model.layers:
        layer.cross.norm = layer.cross.part.key_value = nn.Module()  # a call would be an error
    model(cut(whole, [4, 4, 1, 4], [5, 5, 2, 5]), memory=memory)


def test_items_of_one_sample_stay_apart():
    model = transformer("pre-norm")
    items = packed_tokens({0: 3, 1: 2}, 2, 16)
    layout = Layout((0, 1, 0), (3, 2, 2), 2, (2, 0, 0))  # the longest item of sample 0 is its last
    more = packed_tokens({0: 2}, 1, 16, seed=4)
    tokens = replace(
        merge([items], order=[0, 1]),
        x=torch.cat([items.x, more.x], 1),
        modality=torch.full((1, 7), modality_id("text")),
        position=torch.cat([items.position, more.position], 1),
        segment=segments(layout, 7, torch.device("cpu")),
        layout=layout,
    )
    memory, new = Memory("text"), torch.randn(2, 1, 16)
    model(tokens, memory=memory)
    step = Tokens(
        x=new,
        modality=torch.full((2, 1), modality_id("text")),
        position=torch.tensor([[[3, 0, 0]], [[2, 0, 0]]]),
        segment=torch.tensor([[1], [0]]),
    )
    found = model(step, memory=memory).x
    for row, item in enumerate((items.x[:, :3], items.x[:, 3:])):
        alone = packed_tokens({0: item.shape[1] + 1}, 1, 16)
        torch.testing.assert_close(
            found[row, 0], model(alone.with_x(torch.cat([item, new[row : row + 1]], 1))).x[0, -1]
        )


def test_half_precision_remembers_as_well():
    model = transformer("pre-norm").bfloat16()
    whole = to_padded(sequences({0: 6, 2: 7, 1: 5, 3: 6}))
    whole = whole.with_x(whole.x.bfloat16())
    memory = Memory("text")
    model(cut(whole, [0] * 4, [4, 4, 1, 4]), memory=memory)
    out = model(cut(whole, [4, 4, 1, 4], [5, 5, 2, 5]), memory=memory).x
    expected = torch.stack([model(whole).x[row, at] for row, at in enumerate([4, 4, 1, 4])])
    torch.testing.assert_close(out[:, 0], expected, rtol=0.05, atol=0.05)


def test_errors_say_why():
    tokens = packed_tokens({0: 3}, 1, 16)
    seeing = scramble(Transformer(16, 1, LAYERS["pre-norm"]))
    with pytest.raises(ValueError, match=r"Visibility\(.*\) is not causal.*would have to see what comes later"):
        seeing(tokens, memory=Memory("text"))
    model, memory = transformer("pre-norm"), Memory("text")
    with pytest.raises(ValueError, match="this memory is empty"):
        memory.of(model).next_time()
    model(tokens, memory=memory)
    assert memory.of(model).next_time().tolist() == [3]
    with pytest.raises(ValueError, match="pad them, a row for each sample"):
        model(tokens, memory=memory)
    with pytest.raises(ValueError, match=r"fusion.sequential: true"):
        model(to_padded(tokens), memory=memory)  # its times are those of the first pass


def test_a_stack_without_layers_needs_no_causal_rule() -> None:
    stack = Transformer(8, 0, [])
    tokens = latent_tokens(torch.randn(3, 8), 2, packed=False)
    memory = Memory("latent")
    first = stack(tokens, memory=memory)
    again = stack(tokens, memory=memory)
    torch.testing.assert_close(first.x, again.x)
