"""Laws of the parts around a fusion: what skips cross-attention, cascades, views, times and maps of tokens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from mmformer.encoders import Encoder, TextEmbedder, image_patches
from mmformer.fusion import Cascade, Fusion, InOrder, Mapped, View
from mmformer.heads import SharedHead, UnitHead
from mmformer.model import Encoded, Model
from mmformer.nn import Attention, Block, CrossAttention, Learned, LearnedGrid, Transformer
from mmformer.pooling import FirstPool, MeanPool
from mmformer.tokens import LATENT, merge, to_padded
from mmformer.visibility import Visibility
from tests.helpers import packed_tokens, random_batch, scramble

SELF, CROSS = partial(Attention, num_heads=3), partial(CrossAttention, num_heads=3, context_dim=18)


def stack(dim: int = 12, depth: int = 2, cross=CROSS, **options) -> Transformer:
    return Transformer(dim, depth, [partial(Block, attention=SELF, cross=cross, post_norm=True)], **options)


def enters(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Identity() for name in names}


def reader(**options) -> Fusion:
    """A text that looks at a picture of other channels."""
    return Fusion(12, ["text"], stack(**options), FirstPool(), context=["image"], entrances=enters("text", "image"))


def text(counts=None):
    return packed_tokens(counts or {0: 3, 2: 1, 1: 4}, 3, 12, "text")


def image(counts=None):
    return packed_tokens(counts or {1: 2, 0: 5, 2: 2}, 3, 18, "image", seed=2)


def by_sample(tokens):
    padded = to_padded(tokens)
    return [row[keep] for row, keep in zip(padded.x, padded.valid, strict=True)]


def test_a_sample_without_context_passes_as_though_layers_had_no_cross_attention():
    fusion = scramble(reader())
    plain = Transformer(12, 2, [partial(Block, attention=SELF, post_norm=True)])
    held = {name: t for name, t in fusion.transformer.state_dict().items() if "cross" not in name}
    plain.load_state_dict(held)
    one = image({1: 2})
    mixed = by_sample(fusion({"text": text(), "image": one}, 3))
    every = merge([one, image({0: 5, 2: 2})])
    both, none = by_sample(fusion({"text": text(), "image": every}, 3)), by_sample(plain(text()))
    alone = by_sample(fusion({"text": text()}, 3))
    for row in range(3):
        torch.testing.assert_close(mixed[row], both[row] if row == 1 else none[row])
        torch.testing.assert_close(alone[row], none[row])
        assert (both[row] - none[row]).abs().max() > 0.1


def test_padded_samples_skip_as_packed_ones_do():
    fusion = scramble(reader())
    packed = fusion({"text": text(), "image": image({1: 2})}, 3)
    padded = fusion({"text": to_padded(text()), "image": to_padded(image({1: 2}))}, 3)
    torch.testing.assert_close(padded.x[padded.valid], to_padded(packed).x[padded.valid], rtol=1e-5, atol=1e-5)


def test_a_cascade_is_its_fusions_by_hand():
    answer = packed_tokens({2: 2, 0: 1, 1: 3}, 3, 12, "answer", seed=5)
    causal = stack(cross=partial(CrossAttention, num_heads=2), visibility=Visibility(causal=True))
    last = Fusion(12, ["answer"], causal, FirstPool(), context=["text"], entrances=enters("answer", "text"))
    cascade = scramble(Cascade({"text": reader()}, last))
    encoded = {"text": text(), "image": image(), "answer": answer}
    asked = cascade.earlier["text"](encoded, 3)
    expected = cascade.last(encoded | {"text": asked}, 3)
    out = cascade(encoded, 3)
    assert torch.equal(out.x, expected.x)
    assert torch.equal(cascade.summary(out), cascade.last.summary(expected))
    only = cascade({"answer": answer}, 3)  # nothing to ask about
    torch.testing.assert_close(by_sample(only)[0], by_sample(cascade.last({"answer": answer}, 3))[0])
    assert (by_sample(only)[0] - by_sample(out)[0]).abs().max() > 0.1


def test_a_cascade_names_what_nothing_reads():
    with pytest.raises(ValueError, match=r"makes \['sound'\] but its fusions read \['image', 'text'\]"):
        Cascade({"sound": reader()}, reader())


def test_tokens_in_order_have_a_time_each_which_a_language_model_counts_on():
    tokens = packed_tokens({1: 2, 0: 3}, 2, 12, "image")
    placed = InOrder()(tokens)
    assert placed.position[0, :, 0].tolist() == [0, 1, 0, 1, 2]
    assert torch.equal(placed.position[..., 1:], tokens.position[..., 1:])
    assert InOrder()(to_padded(tokens)).position[:, :2, 0].tolist() == [[0, 1], [0, 1]]
    model = Transformer(12, 0, [], norm=None, position=partial(Learned, num_positions=9))
    fusion = Fusion(
        12, ["image", "text"], model, MeanPool(), sequential=True,
        entrances={"image": nn.Sequential(Mapped(nn.Linear(18, 12)), InOrder()), "text": nn.Identity()},
    )  # fmt: skip
    pictures, words = image({0: 5, 1: 2}), packed_tokens({0: 3, 1: 4, 2: 2}, 3, 12, "text")
    out = by_sample(fusion({"image": pictures, "text": words}, 3))
    mapped = by_sample(Mapped(fusion.entrances["image"][0].part)(pictures))
    for row, (first, second) in enumerate(zip(mapped, by_sample(words), strict=True)):
        joint = torch.cat([first, second])
        torch.testing.assert_close(out[row], joint + model.position.table.weight[: len(joint)])


def views_model(**views) -> Model:
    encoders = {
        "text": Encoder(TextEmbedder(12, 50)),
        "image": Encoder(image_patches(18, 4, 3, partial(LearnedGrid, num_positions=8))),
    }
    heads = {"text": UnitHead(12, 5), "image": SharedHead(UnitHead(12, 5), 3)}
    fusion = Fusion(
        12, [LATENT, "text"], stack(depth=1), MeanPool([LATENT]), context=["image"], num_latents=3,
        entrances=enters("text", "image"),
    )  # fmt: skip
    return scramble(Model(encoders, fusion, heads, views))


APART = Visibility(sees={LATENT: [LATENT], "text": ["text"]})


def test_a_view_reads_a_modality_off_the_fusion_as_though_it_were_alone():
    model = views_model(
        text=View(["text"], FirstPool(start=3), APART), image=View(["image"], FirstPool(count=3, joined=True))
    )
    batch = random_batch(5).only(["text", "image"])
    encoded = model.encode(batch)
    alone = model.encode(batch.only(["text"]))
    vector, present = model.output(encoded, "text", "text")
    tokens = model.fuse(alone, APART)
    first = torch.stack([row[3] if len(row) > 3 else row.new_zeros(12) for row in by_sample(tokens)])
    torch.testing.assert_close(vector, model.heads["text"](first))
    assert sorted(present.nonzero()[:, 0].tolist()) == sorted(set(batch.inputs["text"].rows))
    queries, _ = model.output(encoded, "image", "image")
    assert queries.shape == (5, 15)
    torch.testing.assert_close(queries.unflatten(1, (3, 5)).norm(dim=-1), torch.ones(5, 3))
    seen = by_sample(model.fuse(model.encode(batch.only(["image"]))))
    torch.testing.assert_close(queries[0, 5:10], model.heads["image"].part(seen[0][1:2])[0])


def test_a_view_of_what_a_batch_lacks_is_absent():
    model = views_model(text=View(["text"], FirstPool(start=3), APART))
    vector, present = model.summary(Encoded({}, 4), "text")
    assert not present.any()
    assert not vector.any()


def test_views_need_a_fusion():
    with pytest.raises(ValueError, match=r"views of \['text'\] read a fusion, and there is none"):
        Model({"text": Encoder(TextEmbedder(12, 50))}, views={"text": View(["text"], FirstPool())})
