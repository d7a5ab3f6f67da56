"""Attention and layers written out for one sequence at a time, to hold the packed ones against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmformer.nn import Attention, Block, CrossAttention
from mmformer.tokens import Tokens, modality_id


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    """Softmax attention of (Tq, C) over (Tk, C), head by head; zeros for a query that sees nothing."""
    out = []
    for head in range(heads):
        part = slice(head * q.shape[1] // heads, (head + 1) * q.shape[1] // heads)
        scores = q[:, part] @ k[:, part].T / (q.shape[1] // heads) ** 0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        out.append(torch.nan_to_num(scores.softmax(-1)) @ v[:, part])
    return torch.cat(out, -1)


def self_attention(layer: Attention, x: Tensor, seen: Tensor | None = None) -> Tensor:
    q, k, v = layer.qkv(x).chunk(3, -1)
    return layer.out(attend(q, k, v, layer.heads, seen))


def cross_attention(layer: CrossAttention, x: Tensor, context: Tensor, seen: Tensor | None = None) -> Tensor:
    k, v = layer.key_value(context).chunk(2, -1)
    return layer.out(attend(layer.query(x), k, v, layer.heads, seen))


def feedforward(layer: Block, x: Tensor, activation=F.gelu) -> Tensor:
    return x + layer.feedforward.down(activation(layer.feedforward.up(layer.feedforward_norm(x))))


def block(layer: Block, x: Tensor, seen: Tensor | None = None, activation=F.gelu) -> Tensor:
    """A pre-norm layer without cross-attention."""
    return feedforward(layer, x + self_attention(layer.attention, layer.attention_norm(x), seen), activation)


def rows(tokens: Tokens, modality: str) -> dict[int, Tensor]:
    """The vectors of a modality by sample, for those that have any."""
    flat, sample = tokens.x.flatten(0, 1), tokens.sample().flatten()
    mine = (tokens.modality == modality_id(modality)).flatten()
    found = {int(i): flat[(sample == i) & mine] for i in sample.unique() if i >= 0}
    return {i: x for i, x in found.items() if len(x)}


def gradients(loss: Tensor, parameters) -> list[Tensor]:
    parameters = list(parameters)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
