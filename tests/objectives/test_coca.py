"""CoCa's loss as a list of objectives, against open_clip's."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from mmformer.batch import Batch, Ragged
from mmformer.encoders import Encoder, TextEmbedder, image_patches
from mmformer.fusion import Fusion
from mmformer.heads import UnitHead, VocabularyHead
from mmformer.losses.contrastive import info_nce
from mmformer.model import Model
from mmformer.nn import Attention, AttentionPool, Block, CrossAttention, LearnedGrid, Sinusoid, Transformer
from mmformer.objectives import Contrastive, NextToken
from mmformer.pooling import LastPool
from mmformer.tokens import to_padded
from mmformer.visibility import Visibility
from tests.helpers import scramble

loss = pytest.importorskip("open_clip.loss", reason="the oracle: pip install open_clip_torch")

DIM, WORDS, PAD = 24, 31, 0


def coca() -> Model:
    attention = partial(Attention, num_heads=3)
    causal, pool = Visibility(causal=True), AttentionPool(DIM, partial(CrossAttention, num_heads=3))
    layer, looking = partial(Block, attention=attention), partial(CrossAttention, num_heads=3)
    text = Encoder(
        TextEmbedder(DIM, WORDS, Sinusoid), [Transformer(DIM, 1, [layer], visibility=causal)], pool=LastPool()
    )
    image = Encoder(image_patches(DIM, 4, 3, partial(LearnedGrid, num_positions=8)), pool=pool)
    stack = Transformer(DIM, 2, [partial(Block, attention=attention, cross=looking)], visibility=causal)
    heads = {"text": UnitHead(DIM, 12), "image": UnitHead(DIM, 12), "words": VocabularyHead(DIM, WORDS)}
    model = Model({"text": text, "image": image}, Fusion(DIM, ["text"], stack, LastPool(), context=["image"]), heads)
    scramble(model)
    return model


def pairs(lengths=(5, 3, 9, 2, 5)) -> Batch:
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(1, WORDS, (n,), generator=generator) for n in lengths]
    pictures = [torch.randint(0, 256, (8, 4 * (1 + n % 3), 3), generator=generator, dtype=torch.uint8) for n in lengths]
    rows = range(len(lengths))
    return Batch(
        ids=tuple(map(str, rows)),
        inputs={"text": Ragged.stack(texts, rows), "image": Ragged.stack(pictures, rows, 1)},
        indices=tuple(rows),
    )


def test_contrastive_and_caption_are_the_loss_of_open_clip():
    model, batch = coca(), pairs()
    encoded = model.encode(batch)
    contrastive, caption = Contrastive(["image", "text"], info_nce, 14.3), NextToken("words")
    ours = sum(contrastive(model, encoded, batch).values()) + 2 * caption(model, encoded, batch)["loss"]

    fused = to_padded(model.fuse(encoded))
    ids = torch.zeros(len(batch), fused.x.shape[1], dtype=torch.long)
    for row, text in batch.inputs["text"].items():
        ids[row, : len(text)] = text
    image, text = (model.output(encoded, name, name)[0] for name in ("image", "text"))
    parts = loss.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=PAD)(
        image, text, model.heads["words"](fused.x[:, :-1]), ids[:, 1:], contrastive.log_scale.exp()
    )
    theirs = sum(parts)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    parameters = [*model.parameters(), contrastive.log_scale]
    mine, wanted = (
        torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in (ours, theirs)
    )
    for got, expected in zip(mine, wanted, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
