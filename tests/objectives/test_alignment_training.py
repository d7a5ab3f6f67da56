"""Momentum, queues and negatives through a whole training: accumulation, resume, export, frozen parts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from mmformer.encoders import Encoder, TextEmbedder, image_patches
from mmformer.fusion import Cascade, Fusion, InOrder, Mapped
from mmformer.heads import Head, UnitHead, VocabularyHead
from mmformer.losses.matching import excluded
from mmformer.model import Model
from mmformer.nn import Attention, Block, CrossAttention, Transformer
from mmformer.objectives import DistilledWords, Matching, Momentum, MomentumContrastive, NextToken
from mmformer.objectives.masked import Words
from mmformer.pooling import FirstPool, LastPool, MeanPool
from mmformer.tokens import LATENT
from mmformer.training.finetune import Finetune
from mmformer.training.module import Training
from mmformer.training.optim import adamw
from mmformer.visibility import Visibility
from tests.training.toy import Toy, digest, toy_trainer

PAIR, DIM = ["text", "image"], 16
self_layer = partial(Block, attention=partial(Attention, num_heads=2), dropout=0.1)
cross_layer = partial(self_layer, cross=partial(CrossAttention, num_heads=2))


def encoders() -> dict[str, torch.nn.Module]:
    text, image = TextEmbedder(DIM, vocab_size=3), image_patches(DIM, patch=4, channels=3)
    return {"text": Encoder(text, [Transformer(DIM, 1, [self_layer])]), "image": Encoder(image)}


def albef() -> Model:
    fusion = Fusion(DIM, ["text"], Transformer(DIM, 1, [cross_layer]), FirstPool(), context=["image"])
    heads = {name: UnitHead(DIM, 8) for name in PAIR}
    return Model(encoders(), fusion, heads | {"match": Head(DIM, 2), "words": VocabularyHead(DIM, 3)})


def training(model: Model, objectives, finetune: Finetune | None = None) -> Training:
    return Training(
        model,
        objectives,
        weights={},
        optimizer=partial(adamw, lr=1e-2, weight_decay=0.05, betas=(0.9, 0.98), layer_decay=1.0),
        schedule=lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1.0),
        seed=5,
        ema=None,
        finetune=finetune,
    )


def albef_training() -> Training:
    torch.manual_seed(7)
    objectives = {
        "momentum": Momentum(0.9, 0.4, 5),
        "contrastive": MomentumContrastive(PAIR, 8, 13, 0.07),
        "matching": Matching(PAIR, "match", excluded, top=3),
        "words": DistilledWords(Words("words", 0, 3, [], share=0.5), PAIR),
    }
    return training(albef(), objectives)


def fit(folder: Path, module: Training, steps: int, checkpoint: Path | None = None) -> Training:
    data = Toy()
    data.setup()
    trainer = toy_trainer(folder, steps, accumulate=2, limit_val_batches=0)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path):
    whole = fit(tmp_path / "whole", albef_training(), 6)
    head, *_ = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    assert {"train/loss_contrastive_text_image", "train/loss_matching_text_image", "train/loss_words"} <= set(
        head.split(",")
    )
    fit(tmp_path / "first", albef_training(), 3)
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    resumed = fit(tmp_path / "second", albef_training(), 6, last)
    assert digest(resumed) == digest(whole)
    assert int(whole.objectives["momentum"].step) == 6
    assert int(whole.objectives["contrastive"].queues["text"].next) != 0


def test_a_trained_model_is_saved_without_teacher_and_queue(tmp_path):
    module = albef_training()
    module.prepare()
    _, objectives = module.exported()
    state = {name for name, part in objectives.items() if part.state_dict()}
    assert state == {"momentum", "contrastive"}
    names = [name for part in objectives.values() for name in part.state_dict()]
    assert sorted(names) == ["log_scale", "step"]
    assert any(name.startswith("objectives.momentum.model.") for name in module.state_dict())


def stage_two() -> Model:
    """Queries that have looked at a picture, in front of a text, for a causal Transformer."""
    queries = Fusion(DIM, [LATENT], Transformer(DIM, 1, [cross_layer]), MeanPool(), context=["image"], num_latents=3)
    entrance = torch.nn.Sequential(Mapped(torch.nn.Linear(DIM, DIM)), InOrder())
    writer = Transformer(DIM, 2, [self_layer], visibility=Visibility(causal=True))
    last = Fusion(DIM, ["image", "text"], writer, LastPool(), entrances={"image": entrance}, sequential=True)
    text = Encoder(TextEmbedder(DIM, vocab_size=3))
    heads = {"vocabulary": VocabularyHead(DIM, 3, tied="text")}
    return Model({"text": text, "image": encoders()["image"]}, Cascade({"image": queries}, last), heads)


def test_what_is_frozen_in_the_second_stage_of_blip2_keeps_every_bit(tmp_path):
    torch.manual_seed(7)
    model = stage_two()
    frozen = ["encoders.*", "heads.*", "fusion.last.*"]
    finetune = Finetune(freeze=frozen, train=["fusion.last.entrances.image.*"], unfreeze=(), adapters=None)
    module = training(model, {"caption": NextToken("vocabulary")}, finetune)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(tmp_path, module, 4)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith(("fusion.earlier.", "fusion.last.entrances.image.")) for name in changed)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed <= learned
    assert {"fusion.earlier.image.latents", "fusion.last.entrances.image.0.part.weight"} <= changed
