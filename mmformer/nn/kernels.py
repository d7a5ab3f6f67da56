"""How attention is computed. A kernel maps (q, k, v, sight) to what each query gathers.

All kernels agree (a test holds them equal): they differ in what they cost, and where. A query that sees nothing
gathers zeros. Queries are (B, Tq, H, d), keys (B, Tk, G, d) and values (B, Tk, G, e) with G dividing H (grouped
queries).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmformer.nn.sparse import entries, sparse
from mmformer.visibility import Group, Sight

Kernel = Callable[[Tensor, Tensor, Tensor, Sight], Tensor]
Inner = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Bias = Callable[[Int[Tensor, "n Lq 3"], Int[Tensor, "n Lk 3"]], Float[Tensor, "n H Lq Lk"]]
"""What is added to the scores, from the positions of queries and keys."""

# Above this many keys the score matrix of plain attention no longer fits the cache and SDPA's blocks win.
PLAIN_KEYS = 768
# With this many keys a query on the average, and this share of all pairs in tiles, these win (benchmarks/window.py).
SPARSE_KEYS = 768
SPARSE_SHARE = 0.6


def attend(
    q: Float[Tensor, "B Tq H d"], k: Float[Tensor, "B Tk G d"], v: Float[Tensor, "B Tk G e"], sight: Sight
) -> Float[Tensor, "B Tq H e"]:
    """The fastest kernel for where the tensors are: grouped or variable-length for packed rows, dense for padded.

    On a CPU long rows under a rule that hides most keys, as a window does, take the sparse one.
    """
    if q.device.type == "cpu" and _is_sparse(sight):
        return sparse(q, k, v, sight)
    if not sight.packed:
        return dense(q, k, v, sight)
    if q.device.type == "cpu":
        return grouped(q, k, v, sight)
    if q.device.type != "cuda":
        return dense(q, k, v, sight)
    if sight.visibility.full and q.shape[3] == v.shape[3] and q.dtype in (torch.bfloat16, torch.float16):
        return varlen(q, k, v, sight)
    return flex(q, k, v, sight)


def _is_sparse(sight: Sight) -> bool:
    """Whether the sparse kernel computes so few scores that it wins; looked into only where queries have many keys."""
    if not sight.visibility.rules or torch.compiler.is_compiling():
        return False
    queries = sight.query.segment
    if queries.shape[1] < SPARSE_KEYS or sight.pairs < SPARSE_KEYS * queries.numel():
        return False
    return entries(sight) <= SPARSE_SHARE * sight.pairs


def dense(
    q: Float[Tensor, "B Tq H d"],
    k: Float[Tensor, "B Tk G d"],
    v: Float[Tensor, "B Tk G e"],
    sight: Sight,
    bias: Bias | None = None,
) -> Float[Tensor, "B Tq H e"]:
    """One SDPA call under the whole mask; for export, and the form the others are tested against."""
    inner = _sdpa if bias is None else _biased(bias(sight.query.position, sight.key.position))
    return _masked(q, k, v, sight.dense, sight.dense.any(-1, keepdim=True), inner)


def grouped(
    q: Float[Tensor, "1 Tq H d"],
    k: Float[Tensor, "1 Tk G d"],
    v: Float[Tensor, "1 Tk G e"],
    sight: Sight,
    bias: Bias | None = None,
) -> Float[Tensor, "1 Tq H e"]:
    """Packed rows on a CPU: segments of like length go through one dense call together."""
    groups = sight.groups
    queries = _cut(q[0], [group.query_span for group in groups])
    keys, values = (_cut(x[0], [group.key_span for group in groups]) for x in (k, v))
    inners = [_inner(group, sight, bias) for group in groups]
    parts = [_gather_group(*own) for own in zip(queries, keys, values, groups, inners, strict=True)]
    rest = q.shape[1] - sum(len(part) for part in parts)
    if rest or not parts:
        parts.append(q.new_zeros(rest, q.shape[2], v.shape[3]))
    return torch.cat(parts)[None]


def _cut(x: Float[Tensor, "T G d"], spans: Sequence[slice]) -> Sequence[Float[Tensor, "_ G d"]]:
    """The spans of a row. The backward of one split is one concatenation, that of each slice a whole row of zeros."""
    filled = [span for span in spans if span.stop > span.start]
    if not filled or any(a.stop != b.start for a, b in pairwise(filled)):
        return [x[span] for span in spans]
    sizes = [span.stop - span.start for span in spans]
    return x.split([filled[0].start, *sizes, len(x) - filled[-1].stop])[1:-1]


def _inner(group: Group, sight: Sight, bias: Bias | None) -> Inner | None:
    """Attention with what a bias says of a group; None where there is none."""
    if bias is None or not group.keys:
        return None
    query = _stack(sight.query.position[0][group.query_span], group.query, group.count)
    return _biased(bias(query, _stack(sight.key.position[0][group.key_span], group.key, group.count)))


def _gather_group(q: Tensor, k: Tensor, v: Tensor, group: Group, inner: Inner | None) -> Float[Tensor, "t H e"]:
    if not group.keys:
        return q.new_zeros(*q.shape[:2], v.shape[2])
    q = _stack(q, group.query, group.count)
    k, v = _stack(k, group.key, group.count), _stack(v, group.key, group.count)
    inner = inner or (_plain if _plain_is_faster(q, group.keys) else _sdpa)
    out = _masked(q, k, v, group.mask, group.sees, inner).flatten(0, 1)
    return out if group.out is None else out.index_select(0, group.out)


def _stack(x: Shaped[Tensor, "t ..."], where: Tensor | None, count: int) -> Shaped[Tensor, "n L ..."]:
    """A group's tokens with a row for each of its segments."""
    return (x if where is None else x.index_select(0, where)).unflatten(0, (count, -1))


def _plain_is_faster(q: Tensor, keys: int) -> bool:
    """On a CPU, SDPA has no fast bf16 path, nor one for the oneDNN fp32 matmul (benchmarks/attention.py)."""
    fast = q.dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"
    return fast and keys <= PLAIN_KEYS


def _masked(
    q: Float[Tensor, "n Lq H d"],
    k: Float[Tensor, "n Lk G d"],
    v: Float[Tensor, "n Lk G e"],
    mask: Bool[Tensor, "n 1 _ Lk"] | None,
    sees: Bool[Tensor, "n 1 Lq 1"] | None,
    inner: Inner,
) -> Float[Tensor, "n Lq H e"]:
    """Run attention; queries that see nothing look everywhere and are then set to zero, so that no NaN arises."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if mask is None or sees is None:
        return inner(q, k, v, mask).transpose(1, 2)
    return torch.where(sees, inner(q, k, v, mask | ~sees), 0).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _biased(bias: Float[Tensor, "n H Lq Lk"]) -> Inner:
    """Attention whose scores have something added."""

    def inner(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        return _sdpa(q, k, v, scores)

    return inner


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as matmul, softmax, matmul."""
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return _Plain.apply(q, k, v, mask)  # pyright: ignore


class _Plain(torch.autograd.Function):
    """Its weights are the only matrix that is kept, in the inputs' precision (the softmax itself works in 32 bits).

    What autograd makes of the same four operations reads and writes four times as much, which is most of the time.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (q * q.shape[-1] ** -0.5).contiguous(), k.contiguous(), v.contiguous()
        scores = q @ k.transpose(-1, -2)
        if mask is not None:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    @once_differentiable
    def backward(ctx, given: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore
        q, k, v, weights = ctx.saved_tensors
        given = given.contiguous()
        dv = weights.transpose(-1, -2) @ given
        slope = torch.ops.aten._softmax_backward_data(given @ v.transpose(-1, -2), weights, -1, weights.dtype)
        return (slope @ k).mul_(q.shape[-1] ** -0.5), slope.transpose(-1, -2) @ q, dv, None


def varlen(
    q: Float[Tensor, "1 Tq H d"], k: Float[Tensor, "1 Tk G d"], v: Float[Tensor, "1 Tk G d"], sight: Sight
) -> Float[Tensor, "1 Tq H d"]:
    """Packed rows on CUDA in half precision under the full rule: flash attention over cumulative lengths."""
    from torch.nn.attention.varlen import varlen_attn

    if not sight.visibility.full:
        raise ValueError(f"variable-length flash attention knows only full attention, not {sight.visibility}: use flex")
    bounds_q, bounds_k, longest_q, longest_k = sight.cumulative
    total = int(sight.query.layout.total) if sight.query.layout else q.shape[1]
    if q.shape[2] != k.shape[2]:
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    out = varlen_attn(q[0, :total], k[0], v[0], bounds_q, bounds_k, longest_q, longest_k)
    assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
    return F.pad(out, (0, 0, 0, 0, 0, q.shape[1] - total))[None]


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(
    q: Float[Tensor, "B Tq H d"], k: Float[Tensor, "B Tk G d"], v: Float[Tensor, "B Tk G e"], sight: Sight
) -> Float[Tensor, "B Tq H e"]:
    """FlexAttention under a block mask: any rule, on CUDA with gradients, on a CPU without."""
    from torch.nn.attention.flex_attention import flex_attention

    run = _compiled_flex() if q.device.type == "cuda" and not torch.compiler.is_compiling() else flex_attention
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = run(q, k, v, block_mask=sight.block_mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)
