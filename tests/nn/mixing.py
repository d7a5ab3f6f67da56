"""What all mixers are held to: packed, padded, and a segment by itself give the same, and so do the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmformer.tokens import PADDING, Tokens, merge, to_padded
from mmformer.visibility import Sights, Visibility
from tests.helpers import packed_tokens

LENGTHS = {0: 5, 3: 1, 1: 37, 2: 20}


def texts(lengths: Mapping[int, int], dim: int, seed: int = 0) -> Tokens:
    """Packed texts in double precision, the row a little wider than they are."""
    text = packed_tokens(dict(lengths), max(lengths) + 2, dim, seed=seed)
    wide = merge([text], order=range(max(lengths) + 2), multiple=7)
    return wide.with_x(wide.x.double())


def pictures(shapes: Mapping[int, Sequence[int]], dim: int, axes: Sequence[int] = (1, 2), seed: int = 0) -> Tokens:
    """Packed grids in double precision: sample -> (rows, columns), which fill these axes of the position."""
    tokens = packed_tokens({i: h * w for i, (h, w) in shapes.items()}, max(shapes) + 2, dim, "image", seed)
    places = []
    for height, width in shapes.values():
        place = torch.zeros(height, width, 3, dtype=torch.long)
        place[..., axes[0]] = torch.arange(height)[:, None]
        place[..., axes[1]] = torch.arange(width)
        places.append(place.view(-1, 3))
    return replace(tokens, x=tokens.x.double(), position=torch.cat(places)[None])


def gaps(tokens: Tokens, every: int = 3) -> Tokens:
    """Padded tokens with padding between them, as streams joined by row have it, whose vectors are not zero."""

    def wide(values: Tensor, fill: int) -> Tensor:
        out = torch.full((values.shape[0], 2 * values.shape[1], *values.shape[2:]), fill, dtype=values.dtype)
        out[:, where] = values
        return out

    where = torch.arange(tokens.x.shape[1])
    where = where + where // every
    return Tokens(
        x=wide(tokens.x, 7),
        modality=wide(tokens.modality, 0),
        position=wide(tokens.position, 0),
        segment=wide(tokens.segment, PADDING),
    )


def run(mixer: nn.Module, tokens: Tokens, rule: Visibility | None = None) -> tuple[Tokens, list[Tensor]]:
    """What a mixer gives, by sample, and the gradients of its parameters and of the tokens, by sample."""
    x = tokens.x.detach().requires_grad_()
    out = mixer(tokens.with_x(x), None, Sights(tokens, tokens, rule))
    sample = tokens.sample()
    weight = torch.cos(torch.arange(out.shape[-1]) + 1.0).to(out.dtype)
    assert out.isfinite().all()
    loss = (out * weight)[tokens.valid].pow(2).sum()
    grads = torch.autograd.grad(loss, [x, *mixer.parameters()], allow_unused=True)
    rows = {int(i): (out[sample == i], grads[0][sample == i]) for i in sample.unique() if i >= 0}
    return rows, [torch.zeros(0) if g is None else g for g in grads[1:]]


def assert_same_in_all_layouts(mixer: nn.Module, tokens: Tokens, rule: Visibility | None = None) -> None:
    """Packed, padded, padded with gaps, and each sample alone; outputs and gradients."""
    packed, weights = run(mixer, tokens, rule)
    padded = to_padded(tokens)
    for other in (padded, gaps(padded)):
        rows, others = run(mixer, other, rule)
        for sample, pair in packed.items():
            torch.testing.assert_close(rows[sample], pair)
        torch.testing.assert_close(others, weights)
    for sample, pair in packed.items():
        own = tokens.valid & (tokens.sample() == sample)
        single = Tokens(
            x=tokens.x[own][None],
            modality=tokens.modality[own][None],
            position=tokens.position[own][None],
            segment=torch.zeros(1, int(own.sum()), dtype=torch.long),
        )
        torch.testing.assert_close(run(mixer, single, rule)[0][0], pair)


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Those of a weighted sum of what came out."""
    weight = torch.cos(torch.arange(out.numel())).to(out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weight).sum(), inputs))


def flops(mixer: nn.Module, length: int, dim: int, rule: Visibility | None = None, tokens: Tokens | None = None) -> int:
    """Multiply-adds of matmuls and the like, forward and backward, counted without computing anything."""
    tokens = tokens or packed_tokens({0: length}, 1, dim)
    x = tokens.x.detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        mixer(tokens.with_x(x), None, Sights(tokens, tokens, rule)).sum().backward()
    return counter.get_total_flops()
