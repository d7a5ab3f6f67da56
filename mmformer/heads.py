"""A vector a sample to what is asked of it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class Head(nn.Module):
    """A linear map to `num_outputs`, behind a hidden layer of `hidden` channels if one is wanted."""

    def __init__(self, dim: int, num_outputs: int, hidden: int | None = None):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(dim, hidden), nn.GELU()) if hidden else nn.Identity()
        self.out = nn.Linear(hidden or dim, num_outputs)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        return self.out(self.hidden(x))


class UnitHead(nn.Module):
    """A linear map to `num_outputs` channels of length 1: an embedding that is compared by its cosine."""

    def __init__(self, dim: int, num_outputs: int):
        super().__init__()
        self.out = nn.Linear(dim, num_outputs, bias=False)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        return nn.functional.normalize(self.out(x).float(), dim=-1)
