"""Tell by the fusion whether two modalities belong together, against the pairs that are hardest to tell (ALBEF)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from mmformer.batch import Batch
from mmformer.losses.matching import Weighting, matching_loss, pair_noise, sample_negatives, similarity
from mmformer.model import Encoded, Model
from mmformer.objectives import ranks
from mmformer.objectives.language import untouched
from mmformer.objectives.objective import Objective
from mmformer.objectives.rerank import PairMeter, Second, padded_fields
from mmformer.objectives.space import Pairs, Space, embed
from mmformer.tokens import Layout, Tokens, segments, take


class Matching(Objective):
    """A true pair against two false ones, one for each side: the fused vector through `head`, two classes.

    Over `anchor` with each other of `modalities`, or over all pairs of them where none is named; samples that lack one
    of a pair take no part. What a false pair is made of is drawn by `weighting` (`mmformer.losses.matching`) from the
    samples of all processes, by the similarity in the `Space` that a contrastive objective in front has left; without
    a weighting all are as likely, and no such objective is needed (ViLT, arXiv 2102.03334). Never drawn is what shows
    the same by the integer target `same`.

    In evaluation it ranks anew, for each query, the `top` keys that lie nearest in the space (`PairMeter`); 0 leaves
    that out. `share` of the similarity is added to their scores: 0 in ALBEF, 1 in BLIP.

    Raises:
        ValueError: fewer than two modalities, or an anchor that is none of them.
    """

    headline = ("rerank_r@1", "max")
    by_subset = False

    def __init__(
        self,
        modalities: Sequence[str],
        head: str,
        weighting: Weighting | None,
        top: int,
        *,
        anchor: str | None = None,
        same: str | None = None,
        share: float = 0.0,
    ):
        super().__init__()
        if len(modalities) < 2 or anchor not in (None, *modalities):
            raise ValueError(f"matching over {list(modalities)} by {anchor}: name two at least, the anchor among them")
        self.modalities, self.head, self.weighting, self.same = list(modalities), head, weighting, same
        self.pairs = [pair for pair in combinations(self.modalities, 2) if anchor is None or anchor in pair]
        self.top, self.share = top, share
        self._model: weakref.ref[Model] | None = None

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """The loss of each pair of modalities; together their mean.

        Raises:
            ValueError: a sample has no other to be confused with, or there is no contrastive objective in front.
        """
        space = encoded.shared.get(Space)
        if space is None and self.weighting is not None:
            raise ValueError("matching draws its negatives by similarity: put a contrastive objective in front of it")
        names = dict.fromkeys(name for pair in self.pairs for name in pair)
        device = next(model.parameters()).device
        tokens = {name: gather_tokens(encoded.get(name), len(batch), device) for name in names}
        losses = {}
        for one, other in self.pairs:
            pairs = Pairs.of(batch, (one, other), self.same)
            if self._can_judge(pairs):
                drawn = self._draw(space, (one, other), pairs, batch)
                total = self._loss(model, {name: tokens[name] for name in (one, other)}, drawn)
                losses[f"{one}_{other}"] = ranks.shared_mean(total, 3 * len(pairs.own))
        return {name: loss / len(losses) for name, loss in losses.items()}

    def _can_judge(self, pairs: Pairs) -> bool:
        """Whether there is anything to judge; in evaluation, a batch without negatives is passed over."""
        if self.training:
            return len(pairs.ids) > 0
        return len(pairs.ids) > 1 and not bool(pairs.same().all(1).any())

    def _draw(self, space: Space | None, names: tuple[str, str], pairs: Pairs, batch: Batch) -> dict[str, list[int]]:
        """What the judged pairs are made of, by modality, in samples of all processes: the true ones come first.

        Behind them each sample of the first modality stands with another's of the second, then the other way round.
        """
        device = pairs.own.device
        mine = ranks.start(len(batch)) + pairs.own
        everyone = ranks.gather_ids(mine)
        number = torch.tensor(batch.indices, device=device)[pairs.own] if batch.indices else mine
        numbers, seeds = ranks.gather_ids(number), self._seeds(device)
        out = {name: mine.tolist() for name in names}
        for seed, (asking, asked) in zip(seeds, (names, names[::-1]), strict=True):
            weights = self._weights(space, asking, asked, pairs)
            false = sample_negatives(weights, pair_noise(seed, number, numbers))
            out[asking] += mine.tolist()
            out[asked] += everyone[false].tolist()
        return out

    def _weights(self, space: Space | None, asking: str, asked: str, pairs: Pairs) -> Float[Tensor, "n N"]:
        """How likely each sample's other modality is to be made a false pair with."""
        if space is None or self.weighting is None:
            return (~pairs.same()).float()
        none = space.scale.new_zeros(len(pairs.own), 1)  # what this process lacks, another may have
        rows, keys = (
            side[name][pairs.own] if name in side else none
            for side, name in ((space.rows, asking), (space.keys, asked))
        )
        everyone = ranks.gather_rows(keys).detach()
        if not len(rows):
            return everyone.new_zeros(0, len(everyone))
        return self.weighting(space.scale * similarity(rows, everyone), pairs.same())

    def _seeds(self, device: torch.device) -> list[int]:
        """Of the random numbers of both directions: the first process's, and in evaluation always the same."""
        if not self.training:
            return [0, 1]
        return ranks.gather_ids(torch.randint(2**62, (2,)).to(device))[:2].tolist()

    def _loss(
        self, model: Model, tokens: Mapping[str, Tokens | None], drawn: Mapping[str, list[int]]
    ) -> Float[Tensor, ""]:
        """The loss of telling the pairs that were drawn apart, summed."""
        given = {name: t for name, t in tokens.items() if t is not None}
        count = len(next(iter(drawn.values())))
        if not count:  # other processes have some, and their gradients pass through here
            parts = [untouched(model), *(t.x.float().sum() * 0 for t in given.values())]
            return torch.stack(parts).sum()
        joined = Encoded({name: take(t, drawn[name]) for name, t in given.items()}, count)
        logits, _ = model.output(joined, self.head)
        return matching_loss(logits, torch.arange(count, device=logits.device) < count // 3)

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Unit vectors `<modality>`, NaN where a sample lacks it, and tokens, for what is ranked anew."""
        if not self.top:
            return {}
        self._model = weakref.ref(model)
        names = [name for name in self.modalities if name in encoded]
        fields = (padded_fields(encoded[name], name) for name in names)
        return embed(model, encoded, names, absent=torch.nan) | {
            key: value for part in fields for key, value in part.items()
        }

    def meter(self) -> PairMeter | None:
        if self._model is None:
            return None
        return PairMeter(self.pairs, Second(model=self._model, head=self.head, top=self.top, share=self.share))


def gather_tokens(tokens: Tokens | None, num_samples: int, device: torch.device) -> Tokens | None:
    """The packed tokens of the samples of all processes, numbered in their order; None where none has any.

    `tokens` are those of this process's `num_samples`, None where it lacks the modality. Gradients return to where
    the tokens were made.

    Raises:
        ValueError: padded tokens, in several processes.
    """
    if not ranks.active():
        return tokens
    if tokens is not None and tokens.layout is None:
        raise ValueError("padded tokens in several processes: train with packed ones")
    layout = Layout((), (), num_samples) if tokens is None or tokens.layout is None else tokens.layout
    none = torch.zeros(0, 4, dtype=torch.long, device=device)
    marks = none if tokens is None else torch.cat([tokens.modality[..., None], tokens.position], -1)[0, : layout.total]
    x = ranks.gather_rows(none[:, :1].float() if tokens is None else tokens.x[0, : layout.total])
    marks = ranks.gather_ids(marks.flatten()).view(-1, 4)
    spans = torch.tensor([layout.samples, layout.lengths], dtype=torch.long, device=device)
    spans[0] += ranks.start(num_samples)
    samples, lengths = (tuple(ranks.gather_ids(span).tolist()) for span in spans)
    joined = Layout(samples, lengths, sum(ranks.shares(num_samples)))
    if not joined.total:
        return None
    segment = segments(joined, joined.total, device)
    return Tokens(x=x[None], modality=marks[None, :, 0], position=marks[None, :, 1:], segment=segment, layout=joined)
