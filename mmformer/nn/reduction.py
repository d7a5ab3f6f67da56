"""Fewer tokens: those that are alike become one, those that matter little are left out.

Each part is a stage, Tokens -> Tokens, and works on every segment by itself: a `share` of its tokens goes, rounded
down. The first `prefix` tokens of a segment, those of a class, always stay. How many go depends on lengths alone, so
packed tokens need nothing from the device, and padded ones get narrower by what a full row would lose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mmformer.nn.memory import Memory
from mmformer.nn.transformer import Transformer
from mmformer.tokens import PADDING, Layout, Tokens, segments
from mmformer.visibility import Sights, Visibility

PARTS = 10_000
"""Shares are counted in these: integers round alike on the host, on a device and in an exported graph."""


class TokenMerging(nn.Module):
    """Merge tokens that are alike by bipartite soft matching (ToMe, arXiv 2210.09461, section 3).

    Every other token is compared with all those between by the cosine of their vectors (ToMe compares keys); those with
    the closest partners become one with it, at its place, as the mean over all that either stands for. At most half of
    the tokens can go.

    Raises:
        ValueError: a share below 0 or above 0.5.
    """

    def __init__(self, share: float, prefix: int = 0):
        super().__init__()
        if not 0 <= share <= 0.5:
            raise ValueError(f"share {share}: matching in pairs merges between none (0) and half (0.5) of the tokens")
        self.parts, self.prefix = round(share * PARTS), prefix

    def forward(self, tokens: Tokens) -> Tokens:
        return self.reduce(tokens, None)[0]

    def reduce(self, tokens: Tokens, sizes: Float[Tensor, "B T"] | None) -> tuple[Tokens, Float[Tensor, "B U"]]:
        """Fewer tokens, and of how many each is the mean; `sizes` says that of the given ones, 1 where it is None."""
        rows = _rows(tokens, self.parts, self.prefix)
        size = rows.take(torch.ones_like(tokens.x[..., 0]) if sizes is None else sizes)
        total, size, stay = self._merged(rows.take(tokens.x), size, rows)
        x = (total / size[..., None].clamp(min=1e-6)).to(tokens.x.dtype)
        return rows.shortened(tokens, x, size, stay)

    def _merged(
        self, x: Float[Tensor, "S W D"], size: Float[Tensor, "S W"], rows: _Rows
    ) -> tuple[Float[Tensor, "S W D"], Float[Tensor, "S W"], Bool[Tensor, "S W"]]:
        """The sum of what each token stands for, of how many, and which tokens stay."""
        place = torch.arange(x.shape[1], device=x.device)
        giving, taking = place[self.prefix :: 2], place[self.prefix + 1 :: 2]
        total = x.to(torch.promote_types(x.dtype, torch.float32)) * size[..., None]
        if not len(taking):
            return total, size, rows.valid
        unit = nn.functional.normalize(total.detach(), dim=-1)
        alike = unit[:, giving] @ unit[:, taking].transpose(1, 2)
        there = rows.valid[:, giving, None] & rows.valid[:, None, taking]
        closest, partner = alike.masked_fill(~there, -torch.inf).max(-1)
        goes = closest.argsort(dim=-1, descending=True, stable=True).argsort(-1) < rows.going[:, None]
        moved = torch.where(goes[..., None], total[:, giving], 0)
        sums = total[:, taking].scatter_add(1, partner[..., None].expand_as(moved), moved)
        counts = size[:, taking].scatter_add(1, partner, torch.where(goes, size[:, giving], 0))
        stay = rows.valid.index_copy(1, giving, rows.valid[:, giving] & ~goes)
        return total.index_copy(1, taking, sums), size.index_copy(1, taking, counts), stay


class TokenPruning(nn.Module):
    """Leave out the tokens of the lowest score; what stays is weighted by its own, which is how the score learns.

    The score is a linear map, as in mixture of depths (arXiv 2404.02258) and DynamicViT (arXiv 2106.02034). The weight
    is twice its sigmoid.

    Raises:
        ValueError: a share below 0, or of 1 and more.
    """

    def __init__(self, dim: int, share: float, prefix: int = 0):
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(f"share {share}: give what part of the tokens goes, at least 0 and less than 1")
        self.parts, self.prefix = round(share * PARTS), prefix
        self.score = nn.Linear(dim, 1)

    def forward(self, tokens: Tokens) -> Tokens:
        return self.reduce(tokens, None)[0]

    def reduce(self, tokens: Tokens, sizes: Float[Tensor, "B T"] | None) -> tuple[Tokens, Float[Tensor, "B U"]]:
        """Fewer tokens, and the sizes of those that stay."""
        rows = _rows(tokens, self.parts, self.prefix, whole=True)
        x = rows.take(tokens.x)
        score = self.score(x)[..., 0]
        cells = rows.valid & (torch.arange(x.shape[1], device=x.device) >= self.prefix)
        rank = score.detach().masked_fill(~cells, torch.inf).argsort(dim=-1, stable=True).argsort(-1)
        stay = rows.valid & ~(cells & (rank < rows.going[:, None]))
        x = torch.where(cells[..., None], x * (2 * torch.sigmoid(score)).to(x.dtype)[..., None], x)
        size = rows.take(torch.ones_like(tokens.x[..., 0]) if sizes is None else sizes)
        return rows.shortened(tokens, x, size, stay)


class Shrinking(Transformer):
    """A Transformer with fewer tokens behind every layer but the last; its parameters are named as those of one.

    So a trained Transformer gets a reduction without new weights where that has none (`TokenMerging`). Merged tokens
    are means over all that they stand for, through all layers.

    Raises:
        ValueError: from the call, a context, a memory or a rule of causality: what was merged has no one place in time.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        layers: Sequence[Callable[[int], nn.Module]],
        *,
        reduction: TokenMerging | TokenPruning,
        norm: Callable[[int], nn.Module] | None = nn.LayerNorm,
        entry_norm: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__(dim, depth, layers, norm=norm, entry_norm=entry_norm)
        self.reduction = reduction

    def forward(
        self,
        tokens: Tokens,
        context: Tokens | None = None,
        visibility: Visibility | None = None,
        memory: Memory | None = None,
    ) -> Tokens:
        if context is not None or memory is not None or (visibility is not None and visibility.causal):
            raise ValueError(
                "tokens get fewer in every layer of Shrinking, so it takes no context, memory or causal rule: "
                "reduce in an encoder, in front of a plain Transformer"
            )
        rule = self.visibility if visibility is None else self.visibility & visibility
        tokens, sizes = tokens.with_x(self.entry_norm(tokens.x)), None
        for number, layer in enumerate(self.layers):
            if number:
                tokens, sizes = self.reduction.reduce(tokens, sizes)
            tokens = layer(tokens, None, Sights(tokens, tokens, rule), None)
        return tokens.with_x(self.norm(tokens.x))


@dataclass(frozen=True)
class _Rows:
    """Segments as rows of their tokens, the padding behind: `index` says where each is in the flattened (B T).

    `going` tokens of each row are to go, `longest` of them stay at most. `kept` is the layout of what stays, of packed
    tokens.
    """

    index: Int[Tensor, "S W"]
    valid: Bool[Tensor, "S W"]
    going: Int[Tensor, " S"]
    longest: int
    kept: Layout | None

    def take(self, values: Shaped[Tensor, "B T *C"]) -> Shaped[Tensor, "S W *C"]:
        flat = values.flatten(0, 1)
        return flat.index_select(0, self.index.flatten()).view(*self.index.shape, *flat.shape[1:])

    def shortened(
        self, tokens: Tokens, x: Float[Tensor, "S W D"], size: Float[Tensor, "S W"], stay: Bool[Tensor, "S W"]
    ) -> tuple[Tokens, Float[Tensor, "B U"]]:
        """The tokens that stay, in their order, with new vectors; and their sizes."""
        order = (~stay).to(torch.uint8).argsort(dim=-1, stable=True)[:, : self.longest]
        there = stay.gather(1, order)
        pick = None
        if self.kept is not None:
            real = np.arange(self.longest) < np.asarray(self.kept.lengths, dtype=np.int64)[:, None]
            pick = torch.from_numpy(np.flatnonzero(real)).to(x.device, non_blocking=True)

        def chosen(values: Tensor) -> Tensor:
            found = values.gather(
                1, order.view(*order.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
            )
            return found if pick is None else found.flatten(0, 1).index_select(0, pick)[None]

        out = Tokens(
            x=chosen(x),
            modality=chosen(self.take(tokens.modality)),
            position=chosen(self.take(tokens.position)),
            segment=torch.where(there, chosen(self.take(tokens.segment)), PADDING)
            if self.kept is None
            else segments(self.kept, self.kept.total, x.device),
            layout=self.kept,
        )
        return out, chosen(size)


def _rows(tokens: Tokens, parts: int, prefix: int, whole: bool = False) -> _Rows:
    """Rows of tokens of which a share is to go: at most half of what is behind the prefix, or all but one (`whole`)."""

    def going(length: Tensor) -> Tensor:
        cells = (length - prefix).clamp(min=0)
        return torch.minimum(cells * parts // PARTS, (cells - 1).clamp(min=0) if whole else cells // 2)

    device, layout = tokens.x.device, tokens.layout
    if layout is None:
        width = tokens.x.shape[1]
        order = (~tokens.valid).to(torch.uint8).argsort(dim=-1, stable=True)
        index = order + torch.arange(len(order), device=device)[:, None] * width
        cells = max(width - prefix, 0)
        longest = width - min(cells * parts // PARTS, max(cells - 1, 0) if whole else cells // 2)
        return _Rows(index, tokens.valid.gather(1, order), going(tokens.valid.sum(1)), longest, None)
    lengths = torch.tensor(layout.lengths, dtype=torch.long)
    left = lengths - going(lengths)
    kept = replace(layout, lengths=tuple(left.tolist()))
    step = torch.arange(int(lengths.max()) if len(lengths) else 0)
    index = torch.from_numpy(layout.offsets[:-1])[:, None] + torch.minimum(step, (lengths - 1).clamp(min=0)[:, None])
    index, valid, gone = (t.to(device, non_blocking=True) for t in (index, step < lengths[:, None], going(lengths)))
    return _Rows(index, valid, gone, int(left.max()) if len(left) else 0, kept)
