"""Vectors to ids of a codebook and back: finite scalar quantization, vector quantization, and its residual form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2, prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """N vectors, each replaced by the one that its `ids` stand for, one id for each of Q codebooks.

    The gradient of `x` is that of the vectors themselves (straight-through). `commitment` is a loss that holds them
    near their codes, where one is needed.
    """

    x: Float[Tensor, "N D"]
    ids: Int[Tensor, "N Q"]
    commitment: Float[Tensor, ""] | None = None


class Quantizer(nn.Module):
    """What every quantizer is: `dim` channels, and a codebook of each of `sizes`."""

    dim: int
    sizes: tuple[int, ...]

    @property
    def bits(self) -> float:
        """Bits of the ids of one vector."""
        return sum(log2(size) for size in self.sizes)

    def forward(self, x: Float[Tensor, "N D"]) -> Quantized:
        """Quantize; in training mode this is also a step of learning the codebooks, where they learn from the data."""
        raise NotImplementedError

    def nearest(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N Q"]:
        """The ids alone; nothing is learned."""
        raise NotImplementedError

    def vectors(self, ids: Int[Tensor, "N Q"]) -> Float[Tensor, "N D"]:
        """What ids stand for: bit for bit the `x` that came with them."""
        raise NotImplementedError


class FSQ(Quantizer):
    """Finite scalar quantization (arXiv 2309.15505): channel i is bounded by tanh and rounded to `levels[i]` values.

    Its one codebook has the product of the levels as its size and holds nothing to learn, so no code can die.

    Raises:
        ValueError: no level, or one below 3.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"levels {list(levels)}: give each channel at least 3, as in [8, 5, 5, 5]")
        self.dim, self.sizes = len(levels), (prod(levels),)
        # What the config says already is not saved with the weights.
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor([prod(levels[:i]) for i in range(len(levels))]), persistent=False)

    def forward(self, x: Float[Tensor, "N D"]) -> Quantized:
        bounded = self._bound(x.float())
        rounded = bounded.detach().round()
        half = self.levels // 2
        # Added to the codes is a zero with a gradient: the sum stays exactly what `vectors` gives.
        straight = rounded / half + (bounded - bounded.detach()) / half
        return Quantized(x=straight.to(x.dtype), ids=self._join(rounded + half))

    def nearest(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N 1"]:
        return self._join(self._bound(x.float()).round() + self.levels // 2)

    def vectors(self, ids: Int[Tensor, "N 1"]) -> Float[Tensor, "N D"]:
        half = self.levels // 2
        return (ids // self.basis % self.levels - half) / half

    def index(self, vectors: Float[Tensor, "N D"]) -> Int[Tensor, "N 1"]:
        """The ids of quantized vectors: `vectors` undone."""
        half = self.levels // 2
        return self._join((vectors.float() * half).round() + half)

    def _bound(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Into an interval that holds `levels` whole numbers; an even number of them is not symmetric about 0."""
        half = (self.levels - 1) * 1.001 / 2  # a little more, so that tanh reaches the outer ones
        offset = (self.levels % 2 == 0) / 2
        return torch.tanh(x + torch.atanh(offset / half)) * half - offset

    def _join(self, places: Float[Tensor, "N D"]) -> Int[Tensor, "N 1"]:
        return (places.long() * self.basis).sum(-1, keepdim=True)


class VectorQuantizer(Quantizer):
    """The nearest of `size` codes, each a moving average of the vectors that chose it (VQ-VAE, arXiv 1711.00937).

    A training step moves the averages by 1 - `decay`. A code whose average number of vectors a batch falls below
    `dead_below` is dead: it becomes a vector drawn from the batch, and counts as chosen `dead_below` times; 0 lets
    codes die. As a code starts with a count of 1, the first batch fills most of the codebook. `commitment` is the
    weight of the squared distance to the codes in the loss.
    """

    codebook: Tensor
    count: Tensor
    total: Tensor

    def __init__(self, dim: int, size: int, decay: float = 0.99, commitment: float = 0.25, dead_below: float = 2.0):
        super().__init__()
        self.dim, self.sizes = dim, (size,)
        self.decay, self.commitment, self.dead_below = decay, commitment, dead_below
        codebook = torch.randn(size, dim)
        self.register_buffer("codebook", codebook)
        self.register_buffer("count", torch.ones(size))
        self.register_buffer("total", codebook.clone())

    def forward(self, x: Float[Tensor, "N D"]) -> Quantized:
        vectors = x.float()
        ids = self.nearest(vectors)
        codes = self.vectors(ids)
        if self.training:
            self._learn(vectors.detach(), ids)
        return Quantized(
            x=(codes + (vectors - vectors.detach())).to(x.dtype),
            ids=ids,
            commitment=self.commitment * F.mse_loss(vectors, codes),
        )

    @torch.no_grad()
    def nearest(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N 1"]:
        with torch.autocast(x.device.type, enabled=False):  # half precision takes near codes for one another
            distance = self.codebook.square().sum(1) - 2 * x.float() @ self.codebook.T
        return distance.argmin(1, keepdim=True)

    def vectors(self, ids: Int[Tensor, "N 1"]) -> Float[Tensor, "N D"]:
        return self.codebook[ids[:, 0]]

    @torch.no_grad()
    def _learn(self, x: Float[Tensor, "N D"], ids: Int[Tensor, "N 1"]) -> None:
        # A product and no index_add, which sums in another order each time on a GPU.
        with torch.autocast(x.device.type, enabled=False):
            chosen = (ids == torch.arange(len(self.codebook), device=ids.device)).to(x.dtype)
            self.count.lerp_(chosen.sum(0), 1 - self.decay)
            self.total.lerp_(chosen.T @ x, 1 - self.decay)
        samples = self.count.sum()
        smooth = (self.count + 1e-5) / (samples + 1e-5 * len(self.count)) * samples  # no division by 0
        self.codebook.copy_(self.total / smooth[:, None])
        if self.dead_below > 0:
            self._revive(x)

    def _revive(self, x: Float[Tensor, "N D"]) -> None:
        """Dead codes become vectors of the batch, each a different one; those that find none left wait."""
        dead = self.count < self.dead_below
        place = dead.cumsum(0) - 1
        dead = dead & (place < len(x))
        drawn = x[torch.randperm(len(x), device=x.device)[place.clamp(0, len(x) - 1)]]
        self.codebook.copy_(torch.where(dead[:, None], drawn, self.codebook))
        self.total.copy_(torch.where(dead[:, None], drawn * self.dead_below, self.total))
        self.count.masked_fill_(dead, self.dead_below)


class ResidualVQ(Quantizer):
    """Quantize, then what is left, `num_stages` times (SoundStream, arXiv 2107.03312, algorithm 1).

    `stage` makes one quantizer. A vector is the sum of its codes; the first few ids alone give a coarser one. The sum
    cannot be taken apart again: the nearest code of a sum need not be the first that it was made of.
    """

    def __init__(self, num_stages: int, stage: Callable[[], VectorQuantizer]):
        super().__init__()
        stages = [stage() for _ in range(num_stages)]
        self.stages = nn.ModuleList(stages)
        self.dim, self.sizes = stages[0].dim, tuple(size for part in stages for size in part.sizes)

    def forward(self, x: Float[Tensor, "N D"]) -> Quantized:
        vectors = x.float()
        left, total = vectors, torch.zeros_like(vectors)
        ids, losses = [], []
        for stage in self.stages:
            found: Quantized = stage(left)
            codes = found.x.detach()
            left, total = left - codes, total + codes
            ids.append(found.ids)
            losses.append(found.commitment)
        # One zero with a gradient for the whole sum; one for each stage would count the gradient `num_stages` times.
        return Quantized(
            x=(total + (vectors - vectors.detach())).to(x.dtype),
            ids=torch.cat(ids, 1),
            commitment=torch.stack(losses).sum(),
        )

    @torch.no_grad()
    def nearest(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N Q"]:
        left, ids = x.float(), []
        for stage in self._stages():
            ids.append(stage.nearest(left))
            left = left - stage.vectors(ids[-1])
        return torch.cat(ids, 1)

    def vectors(self, ids: Int[Tensor, "N q"]) -> Float[Tensor, "N D"]:
        """The sum of the codes; of the first stages alone where there are fewer ids."""
        stages = self._stages()
        if ids.shape[1] > len(stages):
            raise ValueError(f"{ids.shape[1]} ids for each vector, but {len(stages)} stages: leave the last ones out")
        total = stages[0].codebook.new_zeros(len(ids), self.dim)
        for stage, column in zip(stages[: ids.shape[1]], ids.split(1, 1), strict=True):
            total = total + stage.vectors(column)
        return total

    def _stages(self) -> list[VectorQuantizer]:
        return list(self.stages)  # pyright: ignore[reportReturnType]
