"""One loss over the samples of all processes.

The gradients of processes are averaged (DDP), so the loss of the global batch is the mean over processes of what each
returns. Training needs every process to make the same calls in the same order, whatever its own samples hold: an
objective asks before it knows whether it has anything to say. Without processes, and in evaluation, where no gradient
is recorded and the processes need not be at the same batch, every function leaves its argument as it is.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmformer.losses.contrastive import ALONE, Peers


def active() -> bool:
    """Whether this is a training step of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and torch.is_grad_enabled()


def shared_mean(total: Float[Tensor, ""], count: int | Int[Tensor, ""]) -> Float[Tensor, ""]:
    """The mean over the `count` things of all processes; `total` is the sum over this one's, 0 where it has none.

    What each process gets is its share of that mean times the number of processes.
    """
    if not active():
        return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
    everyone = torch.as_tensor(count, device=total.device).clone()
    dist.all_reduce(everyone, group=_group())
    return total * dist.get_world_size() / everyone.clamp(min=1)


def nothing(model: nn.Module) -> Float[Tensor, ""]:
    """The total of a process whose samples have nothing to learn from."""
    return torch.zeros((), device=next(model.parameters()).device)


def gather_rows(x: Float[Tensor, "n D"]) -> Float[Tensor, "N D"]:
    """The rows of all processes, in the order of the processes; a process without rows may give any width.

    Every use of a row, on whatever process, sends its gradient back to the process that made the row: the sum over
    processes, which is the exact gradient of the mean of their losses. So the result must reach the loss on each.
    """
    if not active():
        return x
    if not x.requires_grad:  # so that every process takes part in the backward pass
        x = x.detach().requires_grad_()
    return _GatherRows.apply(x, shares(len(x)))  # pyright: ignore


def gather_ids(values: Int[Tensor, " n"]) -> Int[Tensor, " N"]:
    """The numbers of all processes, in the order of the processes."""
    return _gather(values, shares(len(values))) if active() else values


def peers(counts: tuple[int, ...]) -> Peers:
    """The processes that share a contrastive loss, of which each has that many rows."""
    if not active():
        return ALONE
    return Peers(
        count=len(counts),
        start=sum(counts[: dist.get_rank()]),
        gather=partial(_gather, counts=counts),
        own=partial(_own_sum, counts=counts),
        log_sum=_log_sum,
    )


def start(n: int) -> int:
    """Where the rows of this process start among those of all, of which it has `n`."""
    return sum(shares(n)[: dist.get_rank()]) if active() else 0


def shares(n: int) -> tuple[int, ...]:
    """How many each process has, of which this one has `n`."""
    return tuple(count for (count,) in _gather_sizes(n)) if active() else (n,)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, counts: tuple[int, ...]) -> Tensor:
        return _gather(x, counts)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, tuple[int, ...]], output: Tensor) -> None:
        ctx.shape, ctx.counts = inputs[0].shape, inputs[1]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = _own_sum(gradient, ctx.counts)
        return own if len(own) else own.new_zeros(ctx.shape), None


def _own_sum(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """For this process's rows, the sum over processes of what each has for them."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_group())
    return total.split(counts)[dist.get_rank()]


def _log_sum(x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    largest = x.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_group())
    total = (x - largest).exp()
    dist.all_reduce(total, group=_group())
    return total.log() + largest


def _gather(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Rows of all processes, padded to one number on their way."""
    width = x.shape[1:]
    if x.ndim == 2 and 0 in counts:  # a process without rows does not know how wide they are
        width = (max(width for count, width in _gather_sizes(len(x), x.shape[1]) if count or not sum(counts)),)
    padded = x.new_zeros(max(counts), *width)
    if len(x):
        padded[: len(x)] = x.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=_group())
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _gather_sizes(*mine: int) -> list[list[int]]:
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    own = torch.tensor(mine, device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own, group=_group())
    return torch.stack(everyone).tolist()


def _group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return _group_of(dist.group.WORLD)


@lru_cache(maxsize=1)
def _group_of(world: dist.ProcessGroup) -> dist.ProcessGroup:
    # A group of its own: gradients of DDP start their way when they are ready, which differs between processes, and
    # within one group calls are matched by their order.
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    return group
