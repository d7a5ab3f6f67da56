"""A vector a sample to what is asked of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.nn import Residual


class Head(nn.Module):
    """A linear map to `num_outputs`, behind a hidden layer of `hidden` channels if one is wanted.

    For a number, `mean` and `std` are those of the training targets: the weights then work on the standard scale.
    """

    def __init__(self, dim: int, num_outputs: int, hidden: int | None = None, mean: float = 0.0, std: float = 1.0):
        super().__init__()
        self.mean, self.std = mean, std
        self.hidden = nn.Sequential(nn.Linear(dim, hidden), nn.GELU()) if hidden else nn.Identity()
        self.out = nn.Linear(hidden or dim, num_outputs)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        out = self.out(self.hidden(x))
        return out if (self.mean, self.std) == (0.0, 1.0) else out.float() * self.std + self.mean


class UnitHead(nn.Module):
    """A linear map to `num_outputs` channels of length 1: an embedding that is compared by its cosine.

    Without `num_outputs` the vector is only brought to length 1.
    """

    def __init__(self, dim: int, num_outputs: int | None, bias: bool = False):
        super().__init__()
        self.out = nn.Linear(dim, num_outputs, bias=bias) if num_outputs else nn.Identity()

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        return nn.functional.normalize(self.out(x).float(), dim=-1)


class MeanHead(nn.Module):
    """The mean of what several heads say, each of an equal share of the channels (DeiT's two tokens, 2012.12877)."""

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        shares = x.chunk(len(self.parts), -1)
        return torch.stack([part(share) for part, share in zip(self.parts, shares, strict=True)]).mean(0)


class SharedHead(nn.Module):
    """What one head says of each of `count` equal shares of the channels, side by side (BLIP-2's queries)."""

    def __init__(self, part: nn.Module, count: int):
        super().__init__()
        self.part, self.count = part, count

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        return torch.cat([self.part(share) for share in x.chunk(self.count, -1)], -1)


class VocabularyHead(nn.Module):
    """A score for each word of a vocabulary, behind `transform` where there is one (BERT's dense layer and norm).

    `tied` names the encoder whose embedding table the scores share (arXiv 1608.05859); `Model` ties them.
    """

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        *,
        transform: nn.Module | None = None,
        bias: bool = True,
        tied: str | None = None,
    ):
        super().__init__()
        self.transform = transform or nn.Identity()
        self.out = nn.Linear(dim, vocab_size, bias=bias)
        self.tied = tied

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        return self.out(self.transform(x))


def residual_head(dim: int, modalities: Sequence[str], num_outputs: int) -> nn.Sequential:
    """A perceptron with a residual in front of a linear map: the head of MulT (arXiv 1906.00295).

    It reads `dim` channels for every ordered pair of the `modalities`, as `mmformer.nn.Crossmodal` makes them.
    """
    width = dim * len(modalities) * (len(modalities) - 1)
    part = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    return nn.Sequential(Residual(part), nn.Linear(width, num_outputs))
