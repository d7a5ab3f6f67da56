"""Self-attention in which each modality has maps of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from mmformer.nn.experts import ByModality, apply
from mmformer.nn.kernels import Kernel, attend
from mmformer.tokens import Tokens
from mmformer.visibility import Sights, Visibility


class MultiwayAttention(nn.Module):
    """Self-attention of all tokens over all, whose maps have a copy for each of `modalities` and one for all others.

    `inner_norm` stands in front of the last map, and has copies too: the sub-LN of Magneto (arXiv 2210.06423). Without
    modalities all share one set. This is the attention of BEiT-3 as its code has it (torchscale).

    Raises:
        ValueError: channels that do not divide by the heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        modalities: Sequence[str],
        *,
        inner_norm: Callable[[int], nn.Module] | None = None,
        visibility: Visibility | None = None,
        kernel: Kernel = attend,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels do not divide by {num_heads} heads")
        self.heads, self.visibility, self.kernel = num_heads, visibility, kernel
        self.qkv = ByModality(dim, lambda width: nn.Linear(width, 3 * width), modalities)
        self.inner_norm = ByModality(dim, inner_norm, modalities) if inner_norm else nn.Identity()
        self.out = ByModality(dim, lambda width: nn.Linear(width, width), modalities)

    def forward(self, tokens: Tokens, context: Tokens | None, sights: Sights) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(2)
        k, v = sights.joined(k, v)
        gathered = self.kernel(q, k, v, sights.under(self.visibility)).flatten(2)
        return self.out(tokens.with_x(apply(self.inner_norm, tokens.with_x(gathered))))
