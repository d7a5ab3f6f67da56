"""A vector a sample to what is asked of it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


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
    """A linear map to `num_outputs` channels of length 1: an embedding that is compared by its cosine."""

    def __init__(self, dim: int, num_outputs: int):
        super().__init__()
        self.out = nn.Linear(dim, num_outputs, bias=False)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        return nn.functional.normalize(self.out(x).float(), dim=-1)
