"""Contrastive learning of BLIP-2's Q-Former: a text against the best of the queries that have looked at a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.fusion import View
from mmformer.losses.matching import similarity
from mmformer.model import Encoded, Model
from mmformer.objectives import ranks
from mmformer.objectives.momentum import COLDEST, WARMEST
from mmformer.objectives.objective import Objective
from mmformer.objectives.rerank import PairMeter
from mmformer.objectives.space import Pairs, Space
from mmformer.pooling import has_tokens
from mmformer.tokens import LATENT
from mmformer.visibility import Visibility


class QueryContrastive(Objective):
    """A text is as near to a picture as to the best of its queries, and neither sees the other (arXiv 2301.12597).

    Both come from one pass of the fusion, as its views read `text` and each other of `modalities` off it, through their
    heads: one unit vector for a text, several side by side for what the queries have looked at. Over the samples of all
    processes, both directions, with label smoothing. `temperature` divides similarities; it is learned, between 0.001
    and 0.5.

    Leaves the `Space` for objectives behind it, such as `Matching`.

    Raises:
        ValueError: nothing but the text is named.
    """

    headline = ("r@1", "max")
    by_subset = False

    def __init__(self, modalities: Sequence[str], temperature: float, smoothing: float, text: str = "text"):
        super().__init__()
        self.text, self.others = text, [name for name in modalities if name != text]
        if not self.others:
            raise ValueError(f"contrastive over {list(modalities)}: name what the queries look at beside {text!r}")
        self.smoothing = smoothing
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.apart = Visibility(sees={LATENT: [LATENT], text: [text]})

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        scale, losses, found = self.log_scale.exp(), {}, {}
        for other in self.others:
            pairs = Pairs.of(batch, (self.text, other), None)
            rows = self._embed(model, encoded, other)
            sides = {name: rows.get(name, scale.new_zeros(len(batch), 1))[pairs.own] for name in (self.text, other)}
            everyone = {name: ranks.gather_rows(side) for name, side in sides.items()}
            found |= rows
            if not len(pairs.ids):
                continue
            total = scale * 0
            for asking, asked in ((self.text, other), (other, self.text)):
                if len(pairs.own):
                    logits = scale * similarity(sides[asking], everyone[asked])
                    total = total + F.cross_entropy(
                        logits, pairs.place, label_smoothing=self.smoothing, reduction="sum"
                    )
                else:  # gradients of other processes pass through here
                    total = total + everyone[asked].sum() * 0
            losses[f"{self.text}_{other}"] = ranks.shared_mean(total / 2, len(pairs.own))
        encoded.shared[Space] = Space.of(found, found, scale)
        return {name: loss / len(losses) for name, loss in losses.items()}

    def _embed(self, model: Model, encoded: Encoded, other: str) -> dict[str, Float[Tensor, "B _"]]:
        """Unit vectors of the text and of what the queries see of the other, by one pass; zeros where absent."""
        given = encoded.only([self.text, other])
        if not given:
            return {}
        fused, out = model.fuse(given, self.apart), {}
        for name, tokens in given.items():
            view = model.views[name]
            assert isinstance(view, View)
            vector = model.heads[name](view.pool(fused))
            out[name] = torch.where(has_tokens(tokens)[:, None], vector, 0)
        return out

    @torch.no_grad()
    def advance(self, model: Model) -> None:
        self.log_scale.clamp_(-math.log(WARMEST), -math.log(COLDEST))

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Unit vectors `<modality>`, several side by side but for the text's, NaN where a sample lacks it."""
        out: dict[str, Tensor] = {}
        for other in self.others:
            for name, vectors in self._embed(model, encoded, other).items():
                out[name] = torch.where(has_tokens(encoded[name])[:, None], vectors, torch.nan)
        return out

    def meter(self) -> PairMeter:
        return PairMeter([(self.text, other) for other in self.others])
