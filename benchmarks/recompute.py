"""Activation checkpointing of a Transformer: what memory it saves, and what time it costs.

    uv run python -m benchmarks.recompute

A forward and a backward pass of packed texts through 8 layers of 256 channels. Memory is what the pass adds to weights,
inputs and gradients, in a process of its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from benchmarks.timing import Step, interleave, parser, peak_mb, prepare, show
from mmformer.nn import Attention, Block, Transformer
from mmformer.nn.recompute import Recompute
from mmformer.tokens import Layout, Tokens, modality_id, segments

DIM, DEPTH, HEADS = 256, 8, 4
WAYS: dict[str, Recompute | None] = {
    "all is kept": None,
    "every second layer": Recompute(every=2),
    "products are kept": Recompute(keep_products=True),
    "every layer": Recompute(),
}


def texts(count: int, length: int, device: torch.device) -> Tokens:
    layout = Layout(tuple(range(count)), (length,) * count, count)
    position = torch.zeros(1, layout.total, 3, dtype=torch.long)
    position[0, :, 0] = torch.arange(length).repeat(count)
    return Tokens(
        x=torch.randn(1, layout.total, DIM, device=device),
        modality=torch.full((1, layout.total), modality_id("text"), device=device),
        position=position.to(device),
        segment=segments(layout, layout.total, device),
        layout=layout,
    )


def step(model: Transformer, way: Recompute | None, tokens: Tokens, bf16: bool) -> Step:
    def run(number: int) -> None:
        model.recompute = way
        model.zero_grad(set_to_none=False)
        with torch.autocast(tokens.x.device.type, torch.bfloat16) if bf16 else nullcontext():
            out = model(tokens.with_x(tokens.x.detach().requires_grad_())).x
        out.float().square().mean().backward()

    return run


def main() -> None:
    options = parser(__doc__ or "", rounds=5)
    options.add_argument("--count", type=int, default=8, help="texts of a batch")
    options.add_argument("--length", type=int, default=256, help="tokens of each")
    args: Any = prepare(options.parse_args())
    layer = partial(Block, attention=partial(Attention, num_heads=HEADS), dropout=0.1)
    model = Transformer(DIM, DEPTH, [layer]).to(args.device)
    tokens = texts(args.count, args.length, args.device)
    found = []
    for bf16 in (False, True):
        title = f"{args.count} x {args.length} tokens, {'bfloat16' if bf16 else 'float32'}"
        steps = {name: step(model, way, tokens, bf16) for name, way in WAYS.items()}
        steps["all is kept"](0)  # gradients are there from now on
        memory = {name: peak_mb(run, args.device) for name, run in steps.items()}
        print(title, *(f"{name}: {mb:.0f} MB" for name, mb in memory.items()), sep="  ", flush=True)
        found.append(interleave(title, "all is kept", steps, args.rounds, args.device))
    show(found, args)


if __name__ == "__main__":
    main()
