"""Activation checkpointing: what a layer made is dropped after the forward pass and computed again for its gradient.

Chen et al., arXiv 1604.06174; keeping the outputs of products is the selective form of Korthikanti et al.,
arXiv 2205.05198.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._flash_attention_forward.default,
}
"""Linear maps and fused attention: most of the work, and little of the memory. Plain attention's scores are much of
the memory and little of the work."""

_recomputing = 0


def recomputing() -> bool:
    """Whether what runs now has run in the forward pass already."""
    return _recomputing > 0


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """How layers are called in training: every `every`-th is computed again for its gradient, from its input alone.

    With `keep_products` the outputs of linear maps and of fused attention are kept, and norms, activations, dropout
    and written-out attention are computed again. Gradients are those without, dropout included.

    Raises:
        ValueError: `every` below 1.
    """

    every: int = 1
    keep_products: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: 1 computes every layer again, 2 every second one")

    def __call__(self, number: int, layer: nn.Module, *inputs: Any) -> Any:
        """What layer `number` of a stack makes of its inputs."""
        if number % self.every or not torch.is_grad_enabled():
            return layer(*inputs)
        return checkpoint(layer, *inputs, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What is entered around the forward pass, and around its repetition."""
        if not self.keep_products:
            return nullcontext(), _again(nullcontext())
        first, second = create_selective_checkpoint_contexts(_policy)
        return first, _again(second)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _again(inner: AbstractContextManager[Any]) -> Iterator[None]:
    global _recomputing
    with ExitStack() as stack:
        stack.enter_context(inner)
        _recomputing += 1
        stack.callback(_done)
        yield


def _done() -> None:
    global _recomputing
    _recomputing -= 1
