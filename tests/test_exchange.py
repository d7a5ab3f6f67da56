"""Laws of fusions of several sequences: what they refuse, what joins them, and what is made in front of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from mmformer.fusion import Cascade, Exchange, Fusion
from mmformer.heads import residual_head
from mmformer.model import Encoded
from mmformer.nn import Attention, Block, Bottleneck, CrossAttention, Crossmodal, Memory, SinusoidTable, Transformer
from mmformer.pooling import EndPool, FirstPool, MeanPool
from mmformer.tokens import LATENT, merge, to_padded
from tests.helpers import packed_tokens, random_batch, scramble, small_model

DIM, NAMES = 24, ["text", "image", "audio"]


def exchange() -> Exchange:
    layers = [partial(Block, attention=partial(Attention, num_heads=3))]
    mixer = partial(Bottleneck, dim=DIM, depth=2, layers=layers, num_latents=2)
    return scramble(Exchange(NAMES, mixer, EndPool(NAMES)))


def test_a_model_reads_an_exchange_as_any_fusion_whatever_a_sample_lacks():
    model = small_model()
    model.fusion = exchange()
    batch = random_batch()
    encoded = model.encode(batch)
    vectors, _ = model.output(encoded, "answer")
    vectors.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.fusion.parameters())
    padded = Encoded({name: to_padded(t) for name, t in encoded.items()}, len(batch))
    torch.testing.assert_close(model.output(padded, "answer")[0], vectors, rtol=1e-4, atol=1e-4)
    for row, names in enumerate(batch.present()):
        alone, _ = model.output(model.encode(batch.select([row])), "answer")
        torch.testing.assert_close(alone[0], vectors[row], rtol=1e-4, atol=1e-4)
        assert names


def test_an_exchange_names_what_it_cannot_do():
    model = exchange()
    with pytest.raises(ValueError, match=r"the batch has no modality but the stream is \['text', 'image', 'audio'\]"):
        model({}, 2)
    with pytest.raises(TypeError, match="Bottleneck keeps no memory"):
        model({"text": packed_tokens({0: 2}, 1, DIM)}, 1, memory=Memory("text"))


@pytest.mark.parametrize("padded", [False, True])
def test_the_ends_of_each_modality(padded):
    text, image = packed_tokens({0: 3, 1: 2}, 3, 6), packed_tokens({0: 1, 2: 4}, 3, 6, "image", 1)
    tokens = merge([text, image])
    given = to_padded(tokens) if padded else tokens
    first, last = EndPool(["text", "image"])(given), EndPool(["image", "text"], last=True, joined=True)(given)
    rows = {name: {i: t.x[0][t.sample()[0] == i] for i in range(3)} for name, t in (("text", text), ("image", image))}
    torch.testing.assert_close(first[0], (rows["text"][0][0] + rows["image"][0][0]) / 2)
    torch.testing.assert_close(first[1:], torch.stack([rows["text"][1][0], rows["image"][2][0]]))
    expected = [[rows["image"][0][-1], rows["text"][0][-1]], [torch.zeros(6), rows["text"][1][-1]],
                [rows["image"][2][-1], torch.zeros(6)]]  # fmt: skip
    torch.testing.assert_close(last, torch.stack([torch.cat(pair) for pair in expected]))


def test_a_cascade_makes_what_no_encoder_gives():
    """Perceiver IO: latents look at everything, and one query at the latents."""
    look = partial(Block, cross=partial(CrossAttention, num_heads=3))
    first = Fusion(DIM, [LATENT], Transformer(DIM, 1, [look]), MeanPool(), context=["text", "image"], num_latents=3)
    last = Fusion(
        DIM, [LATENT], Transformer(DIM, 1, [look]), FirstPool(), context=["latents"], num_latents=1,
        entrances={"latents": nn.Identity()},
    )  # fmt: skip
    cascade = Cascade({"latents": first}, last)
    assert cascade.entrances == {"text", "image"}
    given = {"text": packed_tokens({0: 2, 1: 1}, 3, DIM), "image": packed_tokens({1: 4}, 3, DIM, "image", 1)}
    out = cascade(given, 3)
    torch.testing.assert_close(out.x, last({"latents": first(given, 3)}, 3).x)
    assert cascade.summary(out).shape == (3, DIM)


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
def test_the_head_of_mult_reads_what_every_modality_knows_of_each_other_one(names):
    layer = partial(Block, cross=partial(CrossAttention, num_heads=2))
    alone = partial(Transformer, depth=1, layers=[partial(Block, attention=partial(Attention, num_heads=2))])
    cross, place = partial(Transformer, depth=1, layers=[layer]), partial(SinusoidTable, num_positions=9)
    mixer = partial(Crossmodal, dim=DIM, cross=cross, alone=alone, position=place)
    fusion = Exchange(names, mixer, EndPool(names, last=True, joined=True))
    streams = {name: packed_tokens({0: 3, 1: 2}, 2, DIM, name) for name in names}
    vectors = fusion.summary(fusion(streams, 2))
    head = scramble(residual_head(DIM, names, 5))
    assert head(vectors).shape == (2, 5)
    first, rest = head
    torch.testing.assert_close(head(vectors), rest(vectors + first.part(vectors)))
