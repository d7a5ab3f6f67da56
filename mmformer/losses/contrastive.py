"""Contrastive losses over pairs, streamed: of the B x B logits one tile exists at a time.

InfoNCE needs two sweeps over the tiles: one for the normalisers of rows and columns, one for the gradients. The
sigmoid loss needs one. Gradients are formed in the forward pass, where a loss is going to be differentiated, so that
memory grows with B x D and not with B x B, and no process waits for another in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPU_TILE = (2048, 2048)  # smaller ones stay in the cache, which gains little; threads wait for one another more often
_GPU_TILE = (4096, 8192)


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The processes that share a batch: by default this one alone.

    Of the rows of all processes this one's begin at `start`. `gather` gives the rows of all; `own` takes something for
    each row of all, sums it over the processes and keeps this one's rows; `log_sum` is the logarithm of the sum over
    processes of exponentials. Of all this, nothing is differentiated.
    """

    count: int = 1
    start: int = 0
    gather: Callable[[Tensor], Tensor] = _same
    own: Callable[[Tensor], Tensor] = _same
    log_sum: Callable[[Tensor], Tensor] = _same


ALONE = Peers()


def info_nce(
    a: Float[Tensor, "n D"],
    b: Float[Tensor, "n E"],
    scale: Float[Tensor, "*two"],
    bias: Float[Tensor, ""] | None = None,
    ids: Int[Tensor, " n"] | None = None,
    peers: Peers = ALONE,
    *,
    soft: bool = False,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of picking each row's partner among all rows, both ways (CLIP, arXiv 2103.00020); no bias.

    A `scale` of two numbers is one for picking a row of `b` and one for picking a row of `a` (CLAP, arXiv 2211.06687).
    Rows of equal `ids` are no negatives of one another; with `soft`, they are partners in equal shares (ALBEF's
    retrieval, arXiv 2107.07651). `smoothing` spreads that share of the target over all rows (BLIP-2, arXiv 2301.12597).

    With `peers` the mean over processes of what each gets is the loss of all rows, if all give it the same weight.

    Raises:
        ValueError: smoothing over rows that are no negatives.
    """
    if smoothing and ids is not None and not soft:
        raise ValueError(
            f"smoothing={smoothing} with ids spreads the target over rows that are no negatives: choose soft=True"
            " for partners in equal shares, or smoothing=0"
        )
    compute = partial(_info_nce, ids=ids, soft=soft, smoothing=smoothing)
    return _streamed(compute, peers, a, b, scale)


def sigmoid(
    a: Float[Tensor, "n D"],
    b: Float[Tensor, "n E"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    ids: Int[Tensor, " n"] | None = None,
    peers: Peers = ALONE,
    *,
    soft: bool = False,
) -> Float[Tensor, ""]:
    """Each pair on its own, a match or not, summed over the pairs of a row (SigLIP, arXiv 2303.15343, algorithm 1).

    Pairs of equal `ids` are left out; with `soft`, they are matches too. `peers` as for `info_nce`.
    """
    return _streamed(partial(_sigmoid, ids=ids, soft=soft), peers, a, b, scale, bias)


# ---------------------------------------------------------------------- gradients, made with the loss


def _streamed(
    compute: Callable[..., tuple[Tensor, ...]], peers: Peers, a: Tensor, b: Tensor, *scalars: Tensor
) -> Tensor:
    """A loss whose gradients `compute` makes beside it, where it is to be differentiated."""
    inputs = (a, b, *scalars)
    trained = torch.is_grad_enabled() and (peers is not ALONE or any(x.requires_grad for x in inputs))
    return _Made.apply(partial(compute, peers=peers, trained=trained), *inputs)  # pyright: ignore


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
        precision = torch.promote_types(inputs[0].dtype, torch.float32)
        with torch.autocast(inputs[0].device.type, enabled=False):
            loss, *gradients = compute(*(x.detach().to(precision) for x in inputs))
        ctx.save_for_backward(*gradients)
        ctx.like = [(x.dtype, x.shape) for x in inputs]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        found = zip(ctx.saved_tensors, ctx.like, ctx.needs_input_grad[1:], strict=True)
        return None, *(
            (part * upstream).to(dtype).view(shape) if needed else None for part, (dtype, shape), needed in found
        )


def _info_nce(
    a: Tensor, b: Tensor, scale: Tensor, *, ids: Tensor | None, soft: bool, smoothing: float, peers: Peers,
    trained: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss and, where it is trained, its gradients for `a`, `b` and `scale`."""
    a, b, ids, own = _meet(a, b, ids, peers)
    across, down = scale.reshape(-1).expand(2)
    ratio = down / across if scale.numel() == 2 else None
    tiles = _Tiles(a, b, across, None if soft else ids, peers.start)
    rows, columns = _normalisers(tiles, ratio, peers)

    def match(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vecdot(a, _partners(b, own, ids if soft else None, smoothing))

    matched = match(a, b)
    share = peers.count / (2 * max(1, len(b)))
    loss = (rows + columns[own] - (across + down) * matched).sum() * share
    if not trained:
        return (loss,)
    with torch.enable_grad():
        leaves = a.detach().requires_grad_(), b.detach().requires_grad_()
        da, db = torch.autograd.grad(match(*leaves).sum() * -(1 + down / across), leaves)
    picked = a.new_zeros(len(a))
    for tile in tiles:
        slope = torch.sub(tile.logits, rows[tile.rows, None], out=tile.spare).exp_()
        if ratio is not None:
            picked[tile.rows] += torch.linalg.vecdot(tile.without_same(slope, 0.0), tile.logits)
            tile.logits.mul_(ratio)
        down_slope = tile.logits.sub_(columns[tile.columns]).exp_()
        slope = slope.add_(down_slope if ratio is None else down_slope.mul_(ratio))
        tile.add_products(tile.without_same(slope, 0.0), da, db)
    dscale = torch.linalg.vecdot(a, da).sum()
    if ratio is not None:
        first = (picked / across - matched).sum()
        dscale = torch.stack([first, (dscale - first) / ratio])
    factor = across * share
    return loss, da.mul_(factor), peers.own(db.mul_(factor)), dscale * share


def _normalisers(tiles: _Tiles, ratio: Tensor | None, peers: Peers) -> tuple[Tensor, Tensor]:
    """The logarithm of the sum of exponentials of each row's logits, and of each column's."""
    rows, columns = (x.new_full((len(x),), -torch.inf) for x in (tiles.a, tiles.b))
    for tile in tiles:
        logits = tile.without_same(tile.logits, -torch.inf)
        rows[tile.rows] = torch.logaddexp(rows[tile.rows], logits.logsumexp(1))
        if ratio is not None:
            logits.mul_(ratio)
        columns[tile.columns] = torch.logaddexp(columns[tile.columns], logits.logsumexp(0))
    return rows, peers.log_sum(columns)


def _partners(b: Tensor, own: slice, group: Tensor | None, smoothing: float) -> Tensor:
    """What each own row is to pick: its partner, or the mean of its group's, and a share of the mean of all."""
    if group is None:
        found = b[own]
    else:
        _, number, size = group.unique(return_inverse=True, return_counts=True)
        total = b.new_zeros(len(size), b.shape[1]).index_add(0, number, b)
        found = (total / size[:, None])[number[own]]
    return found.lerp(b.mean(0), smoothing) if smoothing else found


def _sigmoid(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *, ids: Tensor | None, soft: bool, peers: Peers, trained: bool
) -> tuple[Tensor, ...]:
    """The loss and, where it is trained, its gradients for `a`, `b`, `scale` and `bias`."""
    a, b, ids, _ = _meet(a, b, ids, peers)
    total, dbias, da, db = a.new_zeros(()), a.new_zeros(()), torch.zeros_like(a), torch.zeros_like(b)
    for tile in _Tiles(a, b, scale, ids, peers.start):
        logits = tile.logits.add_(bias)
        logits = tile.negate_same(logits) if soft else tile.without_same(logits, -torch.inf)
        tile.own(logits).neg_()
        total += _softplus_sum(logits, tile.spare)
        if trained:
            slope = logits.sigmoid_()
            tile.own(slope).neg_()
            slope = tile.negate_same(slope) if soft else slope
            dbias += slope.sum()
            tile.add_products(slope, da, db)
    share = peers.count / max(1, len(b))
    if not trained:
        return (total * share,)
    dscale = torch.linalg.vecdot(a, da).sum()
    factor = scale * share
    return total * share, da.mul_(factor), peers.own(db.mul_(factor)), dscale * share, dbias * share


def _softplus_sum(x: Tensor, spare: Tensor) -> Tensor:
    """The sum of log(1 + exp(x)); overwrites `spare`.

    On a CPU log1p takes as long as a product of 512 channels: here log(u), with what u = 1 + exp(-|x|) lost.
    """
    small = torch.abs(x, out=spare).neg_().exp_()
    one_more = small + 1
    lost = (one_more - 1).sub_(small).div_(one_more)
    return one_more.log_().sub_(lost).add_(x.relu()).sum()


def _meet(a: Tensor, b: Tensor, ids: Tensor | None, peers: Peers) -> tuple[Tensor, Tensor, Tensor | None, slice]:
    """Own rows, the rows and ids of all processes, and where the own ones stand among them."""
    b = peers.gather(b)
    a = a if len(a) else b.new_zeros(0, b.shape[1])  # a process without rows does not know how wide they are
    return a, b, None if ids is None else peers.gather(ids), slice(peers.start, peers.start + len(a))


# ---------------------------------------------------------------------- tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tile:
    """Logits of some rows of `a` with some of `b`, and a second tile to work in.

    `same` marks the pairs of equal ids that are not a row's own, which stand on a diagonal.
    """

    rows: slice
    columns: slice
    left: Tensor
    right: Tensor
    logits: Tensor
    spare: Tensor
    diagonal: int
    same: Tensor | None

    def own(self, x: Tensor) -> Tensor:
        return x.diagonal(self.diagonal)

    def without_same(self, x: Tensor, value: float) -> Tensor:
        return x if self.same is None else x.masked_fill_(self.same, value)

    def negate_same(self, x: Tensor) -> Tensor:
        return x if self.same is None else torch.where(self.same, -x, x)

    def add_products(self, slope: Tensor, da: Tensor, db: Tensor) -> None:
        """Add to the gradients what flows through this tile, but for the scale."""
        da[self.rows].addmm_(slope, self.right)
        db[self.columns].addmm_(slope.T, self.left)


class _Tiles:
    """The logits `scale * a @ b.T` tile by tile; each overwrites the one before."""

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor, ids: Tensor | None, start: int):
        self.a, self.b, self.scale, self.ids, self.start = a, b, scale, ids, start

    def __iter__(self) -> Iterator[_Tile]:
        a, b = self.a, self.b
        height, width = _CPU_TILE if a.device.type == "cpu" else _GPU_TILE
        logits, spare = a.new_empty(2, min(height, len(a)) * min(width, len(b)))
        for i in range(0, len(a), height):
            left = a[i : i + height]
            scaled = left * self.scale
            for j in range(0, len(b), width):
                right = b[j : j + width]
                shape = (len(left), len(right))
                place = logits[: shape[0] * shape[1]].view(shape)
                rows, columns = slice(i, i + shape[0]), slice(j, j + shape[1])
                yield _Tile(
                    rows=rows,
                    columns=columns,
                    left=left,
                    right=right,
                    logits=torch.mm(scaled, right.T, out=place),
                    spare=spare[: place.numel()].view(shape),
                    diagonal=self.start + i - j,
                    same=self._same(rows, columns),
                )

    def _same(self, rows: slice, columns: slice) -> Tensor | None:
        if self.ids is None:
            return None
        start = self.start + rows.start
        same = self.ids[start : start + rows.stop - rows.start, None] == self.ids[columns]
        same.diagonal(start - columns.start).fill_(False)
        return same
