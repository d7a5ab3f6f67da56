"""Rank anew, by the head that judges pairs, the keys that lie nearest to a query (ALBEF, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmformer.batch import Batch
from mmformer.losses.matching import similarity
from mmformer.metrics.retrieval import RECALL_AT, first_ranks, recalls
from mmformer.model import Encoded, Model
from mmformer.objectives.objective import letters
from mmformer.tokens import Layout, Tokens, segments, take, to_packed, to_padded

Judge = Callable[[Sequence[int], Sequence[int]], Tensor]
CHUNK, PAIRS = 1024, 256


def match_logits(
    model: Model, head: str, tokens: Mapping[str, Tokens], samples: Mapping[str, Sequence[int]], chunk: int = PAIRS
) -> Float[Tensor, "n 2"]:
    """The logits of `head` for pairs, of which class 1 is that they match; `chunk` pairs are fused at a time.

    Pair i is made of sample `samples[name][i]` of the tokens of each modality, as `Model.encode` gives them.
    """
    device, dtype = (p := next(model.parameters())).device, p.dtype
    count = len(next(iter(samples.values())))
    found = [torch.empty(0, 2, device=device)]
    with torch.no_grad():
        for start in range(0, count, chunk):
            part = {name: take(tokens[name], chosen[start : start + chunk]) for name, chosen in samples.items()}
            joined = Encoded({name: _on(t, device, dtype) for name, t in part.items()}, min(chunk, count - start))
            found.append(model.output(joined, head)[0].float())
    return torch.cat(found)


def match_scores(
    model: Model, head: str, tokens: Mapping[str, Tokens], samples: Mapping[str, Sequence[int]], chunk: int = PAIRS
) -> Float[Tensor, " n"]:
    """How well the samples of each pair match, by the logit of class 1 alone, as ALBEF ranks; see `match_logits`."""
    return match_logits(model, head, tokens, samples, chunk)[:, 1]


def rerank(scores: Float[Tensor, "Q K"], judge: Judge, top: int, share: float = 0.0) -> Float[Tensor, "Q K"]:
    """Scores by which the `top` keys of each query stand in front of all others, in the order of what `judge` says.

    `judge(queries, keys)` scores pairs by their numbers; `share` of the first score is added to that (1 in BLIP, 0 in
    ALBEF). Behind them the other keys keep their order.
    """
    top = min(top, scores.shape[1])
    if not top or not len(scores):
        return scores
    best, keys = scores.topk(top, dim=1)
    queries = torch.arange(len(scores), device=scores.device)[:, None].expand_as(keys)
    judged = judge(queries.flatten().tolist(), keys.flatten().tolist()).to(scores).view_as(best) + share * best
    behind = scores - scores.max() + judged.min() - 1
    return behind.scatter(1, keys, judged)


FIELDS = tuple(field.name for field in fields(Tokens) if field.name != "layout")


def padded_fields(tokens: Tokens, name: str) -> dict[str, Tensor]:
    """Tokens as a prediction holds them, with a row for each sample: `<name>_x`, `<name>_segment`, .."""
    padded = to_padded(tokens)
    return {f"{name}_{field}": getattr(padded, field) for field in FIELDS}


@dataclass
class _Gallery:
    """What the samples of a split have of one modality: unit vectors by the sample's number, and tokens."""

    numbers: list[int] = field(default_factory=list)
    vectors: list[Float[Tensor, "n D"]] = field(default_factory=list)
    tokens: list[tuple[int, Tokens]] = field(default_factory=list)

    def add(self, prediction: Mapping[str, Tensor], name: str, start: int) -> None:
        rows = prediction[name].float().cpu()
        there = ~rows.isnan().any(1)
        self.numbers += (start + there.nonzero()[:, 0]).tolist()
        self.vectors.append(rows[there])
        if f"{name}_x" in prediction:
            x, modality, position, segment = (prediction[f"{name}_{field}"].cpu() for field in FIELDS)
            padded = Tokens(x=x, modality=modality, position=position, segment=segment)
            self.tokens.append((start, to_packed(padded, padded.valid.sum(1).tolist())))

    def rows(self, numbers: Sequence[int]) -> Float[Tensor, "n D"]:
        place = {number: row for row, number in enumerate(self.numbers)}
        return torch.cat(self.vectors)[[place[number] for number in numbers]]

    def joined(self, num_samples: int) -> Tokens:
        """The tokens of all samples in one packed row."""
        layouts = [(start, t.layout) for start, t in self.tokens if t.layout is not None]
        layout = Layout(
            samples=tuple(start + sample for start, part in layouts for sample in part.samples),
            lengths=tuple(length for _, part in layouts for length in part.lengths),
            num_samples=num_samples,
        )
        x, modality, position = (
            torch.cat([getattr(t, name) for _, t in self.tokens], 1) for name in ("x", "modality", "position")
        )
        segment = segments(layout, layout.total, x.device)
        return Tokens(x=x, modality=modality, position=position, segment=segment, layout=layout)


@dataclass(frozen=True, kw_only=True)
class Second:
    """How keys are ranked anew: by class 1 of a model's `head`, of the `top` ones, with a `share` of the similarity."""

    model: Callable[[], Model | None]
    head: str
    top: int
    share: float

    def judge(self, tokens: Mapping[str, Tokens], samples: Mapping[str, Sequence[int]]) -> Float[Tensor, " n"]:
        """`match_scores` of pairs, on the CPU.

        Raises:
            ValueError: the model does not exist any more.
        """
        model = self.model()
        if model is None:
            raise ValueError("the model that made the predictions is gone: keep it until the meter has computed")
        return match_scores(model, self.head, tokens, samples).cpu()


class PairMeter:
    """Retrieval between the two modalities of each pair, among the samples of a split that have both.

    `t2i_r@1`, .. and their means over directions `r@1`, .., by similarity; with `second` keys are ranked anew, and the
    names say so: `rerank_t2i_r@1`. Predictions are unit vectors `<modality>`, NaN where a sample lacks it, of which one
    side may hold several; and, to be ranked anew, `padded_fields` of tokens.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], second: Second | None = None):
        self.pairs, self.second = list(pairs), second
        self._galleries = {name: _Gallery() for pair in pairs for name in pair}
        self._count = 0

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None:
        for name, gallery in self._galleries.items():
            if name in prediction:
                gallery.add(prediction, name, self._count)
        self._count += len(batch)

    def compute(self) -> dict[str, float]:
        letter, found = letters(list(self._galleries)), {}
        for pair in self.pairs:
            both = sorted(set.intersection(*(set(self._galleries[name].numbers) for name in pair)))
            tokens = {name: self._galleries[name].joined(self._count) for name in pair} if self.second and both else {}
            for query, key in (pair, pair[::-1]) if both else ():
                found[f"{letter[query]}2{letter[key]}"] = recalls(self._ranks(query, key, both, tokens))
        if not found:
            return {}
        start = "rerank_" if self.second else ""
        means = {f"r@{k}": sum(way[f"r@{k}"] for way in found.values()) / len(found) for k in RECALL_AT}
        single = {f"{way}_{cut}": value for way, cuts in found.items() for cut, value in cuts.items()}
        return {f"{start}{name}": value for name, value in (means | single).items()}

    def _ranks(self, query: str, key: str, both: Sequence[int], tokens: Mapping[str, Tokens]) -> Float[Tensor, " n"]:
        """At which rank the samples that have both modalities find themselves."""
        queries, keys = self._galleries[query].rows(both), self._galleries[key].rows(both)
        number, ranks = np.array(both), []
        for start in range(0, len(both), CHUNK):
            scores, asking = similarity(queries[start : start + CHUNK], keys), number[start : start + CHUNK]
            if second := self.second:
                judge = partial(_judge_pairs, second, tokens, {query: asking, key: number})
                scores = rerank(scores, judge, second.top, second.share)
            own = torch.arange(start, start + len(scores))[:, None] == torch.arange(len(both))
            ranks.append(first_ranks(scores, own))
        return torch.cat(ranks)


def _judge_pairs(
    second: Second,
    tokens: Mapping[str, Tokens],
    numbers: Mapping[str, np.ndarray],
    queries: Sequence[int],
    keys: Sequence[int],
) -> Float[Tensor, " n"]:
    """The scores of pairs of queries and keys, which are the samples of these numbers."""
    chosen = zip(numbers.items(), (queries, keys), strict=True)
    return second.judge(tokens, {name: number[list(rows)].tolist() for (name, number), rows in chosen})


def _on(tokens: Tokens, device: torch.device, dtype: torch.dtype) -> Tokens:
    moved = {name: getattr(tokens, name).to(device) for name in FIELDS}
    return replace(tokens, **moved | {"x": moved["x"].to(dtype)})
