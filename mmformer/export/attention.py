"""Attention in plain operations, which every target knows and can join or hand to its fast kernels."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.nn.kernels import attend, dense, flex, grouped, varlen
from mmformer.nn.sparse import sparse
from mmformer.visibility import Sight

HIDDEN = -3e4
"""Added to the score of a key that is not seen: finite, so that rows which see nothing hold no NaN, also in 16 bits."""
PLAIN = (attend, dense, flex, grouped, sparse, varlen)
"""Kernels that compute the same, so that one may stand for another."""


def written_out(
    q: Float[Tensor, "B Tq H d"], k: Float[Tensor, "B Tk G d"], v: Float[Tensor, "B Tk G e"], sight: Sight
) -> Float[Tensor, "B Tq H e"]:
    """The kernel `dense` as matmul, softmax and matmul under an added mask.

    `F.scaled_dot_product_attention` exports with checks for masked rows around each call, which ExecuTorch computes
    slowly.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + sight.kept(_hidden).to(q.dtype)
    out = torch.softmax(scores, -1) @ v
    seen = sight.kept(_seen)
    return (out if seen is None else out * seen.to(out.dtype)).transpose(1, 2)


def _hidden(sight: Sight) -> Float[Tensor, "B 1 Tq Tk"]:
    return torch.where(sight.dense, 0.0, HIDDEN)


def _seen(sight: Sight) -> Float[Tensor, "B 1 Tq 1"] | None:
    """1 for queries that see something, else 0; None where each real one sees itself, and padding is of no matter."""
    if sight.query is sight.key and sight.visibility.full:
        return None
    return sight.dense.any(-1, keepdim=True).float()


def write_out_attention(model: nn.Module) -> None:
    """Let all attention of a model that has a plain kernel compute by `written_out`."""
    for part in model.modules():
        if getattr(part, "kernel", None) in PLAIN and not isinstance(part.kernel, nn.Module):
            part.kernel = written_out  # pyright: ignore[reportArgumentType]
