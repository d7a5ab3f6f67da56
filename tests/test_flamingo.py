"""Flamingo as a model: what is frozen stays frozen through training, and what is written goes on from what was seen."""

from __future__ import annotations

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.encoders import Encoder, TextEmbedder, image_patches
from mmformer.fusion import Fusion
from mmformer.heads import VocabularyHead
from mmformer.model import Model
from mmformer.nn import (
    Attention,
    Block,
    ByModality,
    Conditioned,
    CrossAttention,
    FeedForward,
    Gated,
    JointNorm,
    LearnedGrid,
    Memory,
    Resampler,
    Rotary,
    Transformer,
)
from mmformer.objectives import NextToken
from mmformer.pooling import LastPool
from mmformer.tokens import LATENT, Tokens
from mmformer.training.finetune import Finetune
from mmformer.training.module import Training
from mmformer.training.optim import adamw, warmup_cosine
from mmformer.training.quiet import silence
from mmformer.visibility import Visibility
from tests.helpers import packed_tokens, scramble
from tests.nn.test_media import items, language, pictures, sounds
from tests.training.toy import Toy

DIM = 16
LATEST = partial(CrossAttention, num_heads=2, bias=False, visibility=Visibility(current=True))
PLAIN = partial(FeedForward, bias=False)
SILENT = ["encoders.text.*", "fusion.*", "heads.*"]
HEARD = ["fusion.transformer.layers.*.before.*", "fusion.entrances.image.*"]


def flamingo(seed: int = 3) -> Model:
    """A small language model with gates that are closed, and pictures that are resampled."""
    own = {"attention": partial(Attention, num_heads=2, rotary=Rotary), "dropout": 0.1}
    before = partial(Block, cross=partial(Gated, part=LATEST), feedforward=partial(Gated, part=PLAIN))
    looking = partial(
        JointNorm, part=partial(CrossAttention, num_heads=2, bias=False),
        norm=partial(ByModality, part=nn.LayerNorm, modalities=[LATENT]),
    )  # fmt: skip
    norms = {"cross": nn.Identity, "feedforward": nn.LayerNorm}
    resampler = Resampler(DIM, 2, 1, [partial(Block, cross=looking, feedforward=PLAIN, norm=norms)])
    layers = [partial(Conditioned, before=before, **own), partial(Block, **own)]
    mixer = Transformer(DIM, 2, layers, visibility=Visibility(causal=True))
    model = Model(
        {
            "text": Encoder(TextEmbedder(DIM, vocab_size=3)),
            "image": Encoder(image_patches(DIM, 4, 3, partial(LearnedGrid, num_positions=4)), [resampler]),
        },
        Fusion(DIM, ["text"], mixer, LastPool(), context=["image"], sequential=True),
        {"vocabulary": VocabularyHead(DIM, 3, tied="text")},
    )
    scramble(model, seed)
    for part in model.modules():
        if isinstance(part, Gated):
            nn.init.zeros_(part.gate)
    return model


def trained(model: Model, steps: int) -> Training:
    training = Training(
        model,
        {"reply": NextToken("vocabulary")},
        weights={},
        optimizer=partial(adamw, lr=1e-2, weight_decay=0.05, betas=(0.9, 0.98), layer_decay=1.0),
        schedule=partial(warmup_cosine, warmup=0.1, floor=0.02),
        seed=5,
        ema=None,
        finetune=Finetune(freeze=SILENT, train=HEARD, unfreeze=[], adapters=None),
    )
    silence()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, limit_val_batches=0, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(training, datamodule=Toy())
    return training


def test_training_changes_what_looks_and_not_a_bit_of_the_language_model():
    model = flamingo()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = Toy()
    data.setup()
    batch = data.splits["val"].__getitems__([(0, i) for i in range(8)])
    said = spoken(model, batch)
    assert torch.equal(model.fuse(model.encode(batch)).x, said)  # the gates are closed
    trained(model.train(), steps=6)
    learned = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    allowed = ("encoders.image.", "fusion.entrances.image.", ".before.")
    assert all(any(part in name for part in allowed) for name in learned)
    assert {name for name in before if name.endswith(".gate")} <= learned
    assert "encoders.image.stages.0.latents" in learned
    assert torch.equal(spoken(model, batch), said)
    assert not torch.equal(model.fuse(model.encode(batch)).x, said)


def spoken(model: Model, batch: Batch) -> Tensor:
    """What the language model alone makes of the texts."""
    fusion = model.eval().fusion
    assert isinstance(fusion, Fusion)
    whole = Fusion(
        DIM, ["text"], fusion.transformer, fusion.pool, entrances=dict(fusion.entrances.items()), sequential=True
    )
    return whole({"text": model.encode(batch)["text"]}, len(batch)).x


def cut(tokens: Tokens, lengths: list[int]) -> Tokens:
    """The first tokens of each item."""
    assert tokens.layout is not None
    layout = tokens.layout
    kept = [i for start, n in zip(layout.offsets, lengths, strict=False) for i in range(int(start), int(start) + n)]
    part = items(list(layout.samples), lengths, list(layout.places), "text", tokens.x.shape[-1])
    return part.with_x(tokens.x[:, kept])


@pytest.mark.parametrize("new", [1, 2])
def test_a_text_that_goes_on_sees_the_last_medium_as_one_that_is_read_at_once(new):
    """Sample 0 ends behind a sound, sample 1 behind a picture, sample 2 has seen nothing."""
    model = language(0.7)
    lengths = [2, 3, 1, 4, 2]
    whole = items([0, 0, 0, 1, 2], [2, 3, 1 + new, 4 + new, 2 + new], [0, 2, 4, 1, 0], "text", 12)
    media = {"image": pictures(), "audio": sounds()}
    expected = model({"text": whole, **media}, 3)
    memory = Memory("text")
    model({"text": cut(whole, lengths), **media}, 3, memory=memory)
    ends = [int(whole.layout.offsets[i + 1]) for i in (2, 3, 4)]
    for step in range(new):
        rows = torch.stack([whole.x[0, end - new + step] for end in ends])[:, None]
        like = packed_tokens({0: 3}, 1, 12)
        more = Tokens(
            x=rows, modality=like.modality.T, position=like.position.new_zeros(3, 1, 3),
            segment=like.segment.new_zeros(3, 1),
        )  # fmt: skip
        out = model.extend("text", more, memory)
    last = torch.stack([expected.x[0][(expected.sample()[0] == i).nonzero()[-1, 0]] for i in range(3)])
    torch.testing.assert_close(out.x[:, 0], last, rtol=1e-5, atol=1e-5)
