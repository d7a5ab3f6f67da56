"""A training step of a small FLAVA against transformers' and TorchMultimodal's: two towers and a third over both.

    uv run python -m benchmarks.fusion --rounds 5

Towers of 6 layers and 3 layers over both, width 384: 47 M parameters. The loss is contrastive between the class tokens
of both towers, and two classes told from that of the third. Texts have 8 to 77 words (`uniform`), or as captions do.
Ours is opened from transformers' own file, so the first losses must agree. TorchMultimodal has no package of today: it
takes part where `torchmultimodal` can be imported (PYTHONPATH=<a checkout of facebookresearch/multimodal>); its third
Transformer takes no mask, so it attends to padding. All in bf16 with a fused AdamW.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step import CONTEXT, HEADS, LENGTHS, PATCH, SIDE, WIDTH, WORDS, Samples, step
from benchmarks.timing import Timings, interleave, parser, prepare, show
from mmformer.checkpoints import load

TOWER, BOTH, SCALE = 6, 3, 14.0
ALIKE = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}


class Heads(nn.Module):
    """What stands behind the class tokens, alike for all: two projections and two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.match = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, image: Tensor, text: Tensor, both: Tensor) -> Tensor:
        one, other = F.normalize(self.image(image).float(), dim=-1), F.normalize(self.text(text).float(), dim=-1)
        scores, own = SCALE * one @ other.T, torch.arange(len(one), device=one.device)
        contrastive = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        return contrastive + F.cross_entropy(self.match(both).float(), own % 2)


def build_transformers() -> nn.Module:
    from transformers import FlavaConfig, FlavaModel

    torch.manual_seed(0)
    config = FlavaConfig(
        image_config={**ALIKE, "num_hidden_layers": TOWER, "image_size": SIDE, "patch_size": PATCH},
        text_config={**ALIKE, "num_hidden_layers": TOWER, "vocab_size": WORDS, "max_position_embeddings": CONTEXT + 1},
        multimodal_config={**ALIKE, "num_hidden_layers": BOTH},
        image_codebook_config={},
        hidden_size=WIDTH,
        projection_dim=WIDTH,
    )
    return FlavaModel(config).train()


def build_torchmultimodal() -> nn.Module:
    from torchmultimodal.models.flava.model import flava_model  # pyright: ignore[reportMissingImports]

    sizes = {
        f"{name}_{key}": value
        for name, depth in (("image", TOWER), ("text", TOWER), ("multimodal", BOTH))
        for key, value in {**ALIKE, "num_hidden_layers": depth}.items()
    }
    given = {"image_size": SIDE, "patch_size": PATCH, "vocab_size": WORDS, "max_position_embeddings": CONTEXT}
    return flava_model(**given, text_and_image_proj_size=WIDTH, **sizes).train()


def build_ours(peer: Any) -> nn.Module:
    """The model that transformers' file describes."""
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return load(folder).model.train()


def transformers_(pair: Any, samples: Samples) -> Tensor:
    found = pair["model"](input_ids=samples.texts, attention_mask=samples.real, pixel_values=samples.pixels)
    return pair["heads"](*(states[:, 0] for states in (found.image_embeddings, found.text_embeddings,
                                                       found.multimodal_embeddings)))  # fmt: skip


def torchmultimodals(pair: Any, samples: Samples) -> Tensor:
    model = pair["model"]
    image = model.encode_image(samples.pixels)
    text = model.encode_text(samples.texts, samples.real)
    both = model.encode_mm(image.hidden_states[-1], text.hidden_states[-1])
    return pair["heads"](*(found.last_hidden_state[:, 0] for found in (image, text, both)))


def ours(pair: Any, samples: Samples) -> Tensor:
    model = pair["model"]
    encoded = model.encode(samples.batch)
    return pair["heads"](*(model.summary(encoded, source)[0] for source in ("image", "text", None)))


def measure(lengths: str, args: argparse.Namespace) -> Timings:
    batches = [Samples(args.batch, seed, lengths, args.device) for seed in range(3)]
    peer = build_transformers()
    models = {"transformers": peer, "mmformer": build_ours(peer)}
    losses = {"transformers": transformers_, "mmformer": ours}
    if find_spec("torchmultimodal"):
        models["TorchMultimodal"], losses["TorchMultimodal"] = build_torchmultimodal(), torchmultimodals
    else:
        print("TorchMultimodal cannot be imported, so it takes no part: see above")
    torch.manual_seed(1)
    heads = Heads().state_dict()
    steps = {}
    for name, model in models.items():
        pair = nn.ModuleDict({"model": model, "heads": Heads()}).to(args.device)
        pair["heads"].load_state_dict(heads)
        steps[name] = step(pair, losses[name], batches, torch.bfloat16)
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    first = {name: run(0) for name, run in steps.items()}
    apart = abs(first["mmformer"] - first["transformers"]) / abs(first["transformers"])
    print(f"{lengths}: first losses {first}; ours and transformers' {apart:.1e} apart")
    if apart > 2e-2:
        raise ValueError(f"the losses are {apart:.1e} apart: these are not the same step")
    return interleave(f"FLAVA-like step, {lengths}", "transformers", steps, args.rounds, args.device)


def main() -> None:
    options = parser(__doc__ or "", rounds=5)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--lengths", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    args = prepare(options.parse_args())
    show([measure(lengths, args) for lengths in args.lengths], args)


if __name__ == "__main__":
    main()
