"""A training step on packed tokens, against the same model padded per modality.

    python -m benchmarks.packing

The padded model has the same weights, and each modality padded to its longest item, with a row for every sample, as
libraries that have no packed layout do; it runs with SDPA and with matmul-softmax-matmul attention, and the faster of
the two counts. All must give the same loss and gradients. A step is forward, backward and AdamW.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn

from benchmarks.mixture import CLASSES, FRAMES, MELS, PATCH, VOCABULARY, mixed_batch
from benchmarks.timing import Step, Timings, interleave, parse_args, show
from mmformer.batch import Batch
from mmformer.encoders.audio import mel_patches
from mmformer.encoders.encoder import Encoder
from mmformer.encoders.image import image_patches
from mmformer.encoders.text import TextEmbedder
from mmformer.fusion import Fusion
from mmformer.heads import Head
from mmformer.model import Model
from mmformer.nn import Attention, Block, Learned, LearnedGrid, Transformer
from mmformer.nn.kernels import Kernel, attend
from mmformer.objectives.classify import Classes
from mmformer.pooling import MeanPool
from mmformer.tokens import Tokens, to_padded
from mmformer.visibility import Sight

DIM, HEADS, ENCODER_DEPTH, FUSION_DEPTH = 256, 4, 2, 4
SEEDS = tuple(range(12))


class Padded(nn.Module):
    """A stage that gives every sample a row."""

    def forward(self, tokens: Tokens) -> Tokens:
        return to_padded(tokens)


def padded_sdpa(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """Attention by SDPA under a mask of the padding."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=real_keys(sight)).transpose(1, 2)


def padded_matmul(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """Attention as matmul, softmax, matmul, for which a CPU has the faster products."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).masked_fill_(~real_keys(sight), -1e4)
    return (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)


def real_keys(sight: Sight) -> Bool[Tensor, "B 1 1 T"]:
    """Keys that are not padding; all of a row that has none, so that it gives no NaN."""
    valid = sight.key.valid
    return (valid | ~valid.any(1, keepdim=True))[:, None, None]


def build(kernel: Kernel) -> Model:
    """Three encoders and a fusion over [latent, text, image, audio]."""
    torch.manual_seed(0)
    block = partial(Block, attention=partial(Attention, num_heads=HEADS, kernel=kernel))
    embedders = {
        "text": TextEmbedder(DIM, VOCABULARY, partial(Learned, num_positions=77)),
        "image": image_patches(DIM, PATCH, 3, partial(LearnedGrid, num_positions=32)),
        "audio": mel_patches(DIM, MELS, FRAMES, partial(Learned, num_positions=256)),
    }
    encoders = {name: Encoder(e, [Transformer(DIM, ENCODER_DEPTH, [block])]) for name, e in embedders.items()}
    mixer = Transformer(DIM, FUSION_DEPTH, [block])
    fusion = Fusion(DIM, ["latent", "text", "image", "audio"], mixer, MeanPool(["latent"]), num_latents=1)
    return Model(encoders, fusion, {"answer": Head(DIM, CLASSES)})


def pad(model: Model) -> Model:
    """The same model on padded rows."""
    for encoder in model.encoders.values():
        assert isinstance(encoder, Encoder)
        encoder.stages.insert(0, Padded())
    return model


def loss(model: Model, batch: Batch, dtype: torch.dtype) -> Tensor:
    """The classification loss of a batch."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        return Classes("answer", "label")(model, model.encode(batch), batch)["loss"]


def check_equal(packed: Model, padded: Model, batch: Batch, dtype: torch.dtype) -> None:
    """Refuse to time two models that do not compute the same."""
    found, gradients = [], []
    for model in (packed, padded):
        value = loss(model, batch, dtype)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
        found.append(value.item())
    apart = abs(found[0] - found[1]) / abs(found[1])
    turned = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    print(f"{dtype}: loss {found[0]:.6f} packed, {found[1]:.6f} padded; gradients differ by {turned:.1e} relative")
    allowed = (1e-5, 1e-4) if dtype == torch.float32 else (2e-2, 1e-1)
    if apart > allowed[0] or turned > allowed[1]:
        raise ValueError(f"loss differs by {apart:.1e} and gradients by {turned:.1e}, more than {allowed}")


def step(model: Model, batches: list[Batch], dtype: torch.dtype) -> Step:
    """A training step on the batch of the round."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run(number: int) -> None:
        loss(model, batches[number % len(batches)], dtype).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def count_tokens(model: Model, padded: Model, batches: list[Batch]) -> None:
    """Print how much of the padded sequence is padding."""
    with torch.no_grad():
        real = sum(model.fuse(model.encode(batch)).valid.sum().item() for batch in batches)
        slots = sum(padded.fuse(padded.encode(batch)).valid.numel() for batch in batches)
    print(f"{real} real tokens, {slots} padded ones: {1 - real / slots:.0%} padding")


def main() -> None:
    assert __doc__
    args = parse_args(__doc__.splitlines()[0], rounds=len(SEEDS))
    batches = [mixed_batch(seed).to(args.device) for seed in SEEDS]
    models = {
        "padded, SDPA": pad(build(padded_sdpa)),
        "padded, matmul attention": pad(build(padded_matmul)),
        "packed": build(attend),
    }
    models = {name: model.to(args.device) for name, model in models.items()}
    count_tokens(models["packed"], models["padded, SDPA"], batches)
    found: list[Timings] = []
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("padded, SDPA", "padded, matmul attention"):
            check_equal(models["packed"], models[name], batches[0], dtype)
        steps = {name: step(copy.deepcopy(model), batches, dtype) for name, model in models.items()}
        found.append(interleave(str(dtype).removeprefix("torch."), "padded, SDPA", steps, args.rounds, args.device))
    show(found, args)


if __name__ == "__main__":
    main()
