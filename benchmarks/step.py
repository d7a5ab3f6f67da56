"""A training step of CLIP ViT-S/16 against open_clip's and transformers', the same weights and samples on all sides.

    uv run python -m benchmarks.step --rounds 5
    uv run python -m benchmarks.step --fp32

A step is forward, contrastive loss, backward and fused AdamW over 62.3 M parameters. Texts have 8 to 77 words, evenly
(`uniform`) or as captions do (14 on average). Peers get pictures that are normalised already; ours do it in the step.
Ours is opened from open_clip's own file, so the first losses must agree. Beside the speed stands the share of the rate
of plain bf16 products on this machine that real operations reach: those of tokens that are no padding.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Timings, interleave, parser, prepare, show
from mmformer.batch import Batch, Ragged
from mmformer.checkpoints import load
from mmformer.objectives import Contrastive
from mmformer.objectives.contrastive import info_nce

WORDS, CONTEXT, WIDTH, DEPTH, HEADS, SIDE, PATCH = 49_408, 77, 384, 12, 6, 224, 16
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LENGTHS: dict[str, Callable[[int], Tensor]] = {
    "uniform": lambda n: torch.randint(8, CONTEXT + 1, (n,)),
    "captions": lambda n: (14 + 4 * torch.randn(n)).round().long().clamp(8, CONTEXT),
}


class Samples:
    """Pictures and texts of one batch, as ours and as padded ones."""

    def __init__(self, size: int, seed: int, lengths: str, device: torch.device):
        torch.manual_seed(seed)
        self.counts = LENGTHS[lengths](size).tolist()
        begin, end = torch.tensor([WORDS - 2]), torch.tensor([WORDS - 1])
        texts = [torch.cat([begin, torch.randint(1, WORDS - 3, (n - 2,)), end]) for n in self.counts]
        pixels = torch.randint(0, 256, (size, SIDE, SIDE, 3), dtype=torch.uint8)
        inputs = {
            "text": Ragged.stack(texts, list(range(size)), 0),
            "image": Ragged.stack(list(pixels), list(range(size)), 1),
        }
        ids = tuple(map(str, range(size)))
        self.batch = Batch(ids=ids, inputs=inputs, targets={}, indices=tuple(range(size))).to(device)
        self.pixels = (
            ((pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous().to(device)
        )
        self.texts = torch.zeros(size, CONTEXT, dtype=torch.long)
        for row, text in zip(self.texts, texts, strict=True):
            row[: len(text)] = text
        self.texts = self.texts.to(device)
        self.real = (torch.arange(CONTEXT) < torch.tensor(self.counts)[:, None]).long().to(device)

    @property
    def operations(self) -> float:
        """Floating-point operations of a step on real tokens: three times those of the forward pass."""
        images = len(self.counts) * (tower((SIDE // PATCH) ** 2 + 1) + 2 * (SIDE // PATCH) ** 2 * 3 * PATCH**2 * WIDTH)
        return 3 * (images + sum(map(tower, self.counts)))


def tower(tokens: int) -> float:
    """Operations of a Transformer on one sequence: its linear maps, scores and what is gathered by them."""
    return DEPTH * (2 * tokens * 12 * WIDTH**2 + 4 * tokens**2 * WIDTH)


def build_open_clip() -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    model: Any = open_clip.create_model("ViT-S-16", pretrained=None)
    with torch.no_grad():  # what starts at zero hides mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def build_transformers() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": DEPTH,
             "num_attention_heads": HEADS, "projection_dim": WIDTH, "hidden_act": "gelu"}  # fmt: skip
    text = {**tower, "max_position_embeddings": CONTEXT, "vocab_size": WORDS, "eos_token_id": WORDS - 1,
            "bos_token_id": WORDS - 2, "pad_token_id": 0}  # fmt: skip
    vision = {**tower, "image_size": SIDE, "patch_size": PATCH}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH, attn_implementation="sdpa")
    return CLIPModel(config).train()


def build_ours(peer: nn.Module) -> nn.Module:
    """The peer's weights in our parts, with the scale of the loss."""
    import open_clip
    from safetensors.torch import save_file

    config = {"model_cfg": open_clip.get_model_config("ViT-S-16"), "preprocess_cfg": {"mean": MEAN, "std": STD}}
    with tempfile.TemporaryDirectory() as folder:
        save_file(
            {name: t.contiguous() for name, t in peer.state_dict().items()}, f"{folder}/open_clip_model.safetensors"
        )
        Path(folder, "open_clip_config.json").write_text(json.dumps(config))
        loaded = load(folder)
    objective = Contrastive(["image", "text"], info_nce, peer.logit_scale.exp().item())  # pyright: ignore
    return nn.ModuleDict({"model": loaded.model.train(), "objective": objective})


def ours(module: Any, samples: Samples) -> Tensor:
    encoded = module["model"].encode(samples.batch)
    return module["objective"](module["model"], encoded, samples.batch)["image_text"]


def open_clips(model: Any, samples: Samples) -> Tensor:
    import open_clip

    return open_clip.ClipLoss()(*model(samples.pixels, samples.texts))


def transformers_(model: Any, samples: Samples) -> Tensor:
    given = {"input_ids": samples.texts, "attention_mask": samples.real, "pixel_values": samples.pixels}
    return model(**given, return_loss=True).loss


def step(
    model: nn.Module, loss: Callable[[Any, Samples], Tensor], batches: Sequence[Samples], dtype: torch.dtype
) -> Callable[[int], float]:
    """A training step on the batch of the round; gives the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    device = next(model.parameters()).device.type

    def run(number: int) -> float:
        with torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext():
            value = loss(model, batches[number % len(batches)])
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return run


def peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a plain product as large as the step's own, the best of several."""
    a, b = (torch.randn(size, dtype=dtype, device=device) for size in ((3152, 384), (384, 1536)))
    best = float("inf")
    for _ in range(20):
        start = time.process_time()
        for _ in range(4):
            a @ b
        best = min(best, (time.process_time() - start) / 4)
    return 2 * 3152 * 384 * 1536 / best


def measure(lengths: str, dtype: torch.dtype, args: Any) -> Timings:
    batches = [Samples(args.batch, seed, lengths, args.device) for seed in range(3)]
    peer = build_open_clip()
    models = {"open_clip": peer.to(args.device), "mmformer": build_ours(peer).to(args.device)}
    losses = {"open_clip": open_clips, "mmformer": ours}
    if dtype != torch.float32:
        models["transformers"], losses["transformers"] = build_transformers().to(args.device), transformers_
    steps = {name: step(models[name], losses[name], batches, dtype) for name in models}
    first = {name: run(0) for name, run in steps.items()}
    apart = abs(first["mmformer"] - first["open_clip"]) / abs(first["open_clip"])
    print(f"{lengths}, {dtype}: first losses {first}; ours and open_clip's {apart:.1e} apart")
    if apart > (1e-4 if dtype == torch.float32 else 2e-2):
        raise ValueError(f"the losses are {apart:.1e} apart: these are not the same step")
    found = interleave(f"CLIP step, {lengths}", "open_clip", steps, args.rounds, args.device)
    if args.device.type == "cpu" and args.threads == 1:
        rate = sum(b.operations for b in batches) / len(batches) / (found.median_ms("mmformer") / 1e3)
        print(
            f"{lengths}: {rate / 1e9:.0f} GFLOP/s on real tokens, {rate / peak(dtype, args.device):.0%} of a product's"
        )
    return found


def main() -> None:
    options = parser(__doc__ or "", rounds=5)
    options.add_argument("--fp32", action="store_true", help="in 32 bits, against open_clip alone")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--lengths", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    args = prepare(options.parse_args())
    dtype = torch.float32 if args.fp32 else torch.bfloat16
    show([measure(lengths, dtype, args) for lengths in args.lengths], args)


if __name__ == "__main__":
    main()
