"""A tiny run for the tests of training: two modalities, dropout, noise on every sample, rows that lack a modality."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from mmformer.batch import Batch, Fault, Ragged
from mmformer.datasets.datamodule import Loaders, Loading
from mmformer.datasets.sampler import counter_seed
from mmformer.encoders import Encoder, TextEmbedder, image_patches
from mmformer.fusion import Fusion
from mmformer.heads import Head
from mmformer.model import Model
from mmformer.nn import Attention, Block, Transformer
from mmformer.objectives import Classes
from mmformer.pooling import MeanPool
from mmformer.training.checkpointing import AtomicCheckpointIO
from mmformer.training.checkpoints import Checkpoints
from mmformer.training.data_errors import DataErrors
from mmformer.training.finetune import Finetune
from mmformer.training.loggers import MetricsCSV
from mmformer.training.module import Training
from mmformer.training.optim import adamw, warmup_cosine
from mmformer.training.quiet import silence


class ToySplit:
    """`size` samples whose class is written as a token and, darker or lighter, as a picture."""

    def __init__(self, size: int, train: bool, broken: frozenset[int] = frozenset()) -> None:
        self.size, self.train, self.broken = size, train, broken

    def __len__(self) -> int:
        return self.size

    def num_tokens(self) -> list[int]:
        return [2 + i % 5 for i in range(self.size)]

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        keys = [key for key in keys if key[1] not in self.broken]
        texts, pictures, with_text, with_picture = [], [], [], []
        for row, (epoch, index) in enumerate(keys):
            draw = torch.Generator().manual_seed(counter_seed("toy", epoch if self.train else -1, index))
            label = index % 3
            if index % 4 != 1:
                texts.append(torch.full((2 + index % 5,), label))
                with_text.append(row)
            if index % 4 != 2:
                noise = torch.randint(0, 60, (4, 4, 3), generator=draw)
                pictures.append((noise + 60 * label).to(torch.uint8))
                with_picture.append(row)
        inputs = {"text": Ragged.stack(texts, with_text), "image": Ragged.stack(pictures, with_picture, 1)}
        return Batch(
            ids=tuple(f"row-{index}" for _, index in keys),
            inputs={name: ragged for name, ragged in inputs.items() if len(ragged)},
            targets={"label": torch.tensor([index % 3 for _, index in keys])},
            faults=tuple(
                Fault(id=f"row-{i}", column="image", path=f"{i}.png", reason="is broken") for i in self.broken
            ),
            epoch=keys[0][0] if keys else 0,
            indices=tuple(index for _, index in keys),
        )


class Toy(Loaders):
    def __init__(self, workers: int = 0, size: int = 44, batch_tokens: int | None = None, **split: Any) -> None:
        loading = Loading(
            batch_size=None if batch_tokens else 8,
            batch_tokens=batch_tokens,
            eval_batch_size=16,
            num_workers=workers,
            timeout=60,
            decode_timeout=None,
            pin_memory=False,
        )
        super().__init__(loading, seed=3)
        self.size, self.split = size, split

    def setup(self, stage: str | None = None) -> None:
        sizes = {"train": self.size, "val": 20, "test": 20}
        self.splits = {name: ToySplit(size, name == "train", **self.split) for name, size in sizes.items()}


def toy_model(dim: int = 16) -> Model:
    layer = partial(Block, attention=partial(Attention, num_heads=2), dropout=0.1)
    fusion = Fusion(dim, ["latent", "text", "image"], Transformer(dim, 1, [layer]), MeanPool(["latent"]), num_latents=1)
    encoders = {
        "text": Encoder(TextEmbedder(dim, vocab_size=3)),
        "image": Encoder(image_patches(dim, patch=4, channels=3)),
    }
    return Model(encoders, fusion, {"answer": Head(dim, 3)})


def toy_training(
    ema: float | None = None, lr: float = 1e-2, layer_decay: float = 1.0, finetune: Finetune | None = None
) -> Training:
    torch.manual_seed(7)
    return Training(
        toy_model(),
        {"answer": Classes("answer", "label")},
        weights={},
        optimizer=partial(adamw, lr=lr, weight_decay=0.05, betas=(0.9, 0.98), layer_decay=layer_decay),
        schedule=partial(warmup_cosine, warmup=0.1, floor=0.02),
        seed=5,
        ema=ema,
        finetune=finetune,
    )


def toy_trainer(folder: Path, steps: int = 14, accumulate: int = 1, **options: Any) -> pl.Trainer:
    silence()
    every = options.pop("every_n_steps", 3)
    callbacks = [
        *options.pop("callbacks", []),
        Checkpoints(str(folder / "checkpoints"), "val/acc", "max", every_n_steps=every),
        DataErrors(str(folder / "data_errors.jsonl"), options.pop("max_bad_fraction", 0.05)),
    ]
    return pl.Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=[MetricsCSV(str(folder / "metrics.csv"))],
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **options,
    )


def digest(module: torch.nn.Module) -> str:
    """A hash of every number a module holds."""
    state = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        state.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


def result(folder: Path, module: Training, trainer: pl.Trainer) -> dict[str, Any]:
    """Everything of a run that a resumed one must have too."""
    optimizer = json.dumps([group["lr"] for group in trainer.optimizers[0].param_groups])
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    return {
        "weights": digest(module),
        "step": trainer.global_step,
        "rates": optimizer,
        "curve": (folder / "metrics.csv").read_text(),
        "best": hashlib.sha256(
            repr(sorted((k, v.tolist()) for k, v in best["state_dict"].items())).encode()
        ).hexdigest(),
    }
