"""How unlike in length segments may be to share an attention call: the ground of `CALL_COST` (visibility.py).

    python -m benchmarks.grouping

Forward and backward of one layer's attention (4 heads of 64 channels) over packed mixed batches, for several values.
The base is a call for each distinct length.
"""

from __future__ import annotations

import torch

import mmformer.visibility
from benchmarks.mixture import mixed_batch
from benchmarks.timing import Step, Timings, interleave, parse_args, show
from mmformer.batch import Batch
from mmformer.nn.kernels import grouped
from mmformer.tokens import Layout, Tokens, segments
from mmformer.visibility import Sight, Visibility

HEADS, HEAD_DIM = 4, 64
COSTS = (0, 512, 2048, 8192, 32768)


def lengths(batch: Batch, modality: str) -> list[int]:
    """A length for each item of a modality, sorted as items are."""
    return [shape[0] for shape in batch.inputs[modality].shapes]


def step(length: list[int], cost: int, dtype: torch.dtype) -> Step:
    """Forward and backward; the groups are planned before, as they are once for all layers of a step."""
    layout = Layout(tuple(range(len(length))), tuple(length), len(length))
    shape = (1, layout.total)
    row = Tokens(
        x=torch.zeros(*shape, 1),
        modality=torch.zeros(shape, dtype=torch.long),
        position=torch.zeros(*shape, 3, dtype=torch.long),
        segment=segments(layout, layout.total, torch.device("cpu")),
        layout=layout,
    )
    sight = Sight(Visibility(), row, row)
    before, mmformer.visibility.CALL_COST = mmformer.visibility.CALL_COST, cost
    planned = sight.groups  # made on first use, and kept
    mmformer.visibility.CALL_COST = before
    assert planned is sight.groups
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, HEADS, HEAD_DIM, generator=make).to(dtype).requires_grad_() for _ in range(3))

    def run(number: int) -> None:
        torch.autograd.grad(grouped(q, k, v, sight).sum(), (q, k, v))

    return run


def main() -> None:
    assert __doc__
    args = parse_args(__doc__.splitlines()[0], rounds=7)
    found: list[Timings] = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, num_samples in (("text", 16), ("text", 128), ("audio", 16)):
            length = lengths(mixed_batch(0, num_samples), name)
            length = length if name == "text" else [n // 4 for n in length]
            steps = {f"cost {cost}": step(length, cost, dtype) for cost in COSTS}
            title = f"{str(dtype).removeprefix('torch.')}, {name} of {num_samples} samples"
            found.append(interleave(title, "cost 0", steps, args.rounds, args.device))
    show(found, args)


if __name__ == "__main__":
    main()
