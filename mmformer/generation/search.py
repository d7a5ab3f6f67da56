"""Ways to choose the next token: the likeliest, a random one, or several at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmformer.generation.draft import Draft
from mmformer.generation.limits import Limits, Scores, keep_nucleus, keep_top


@dataclass(frozen=True, kw_only=True)
class Written:
    """One text: its ids without the one that ended it, which is `stop`; None where the length did.

    `log_likelihood` is that of all its tokens, the ending one too, under the model alone; beam search ranks by `score`.
    """

    ids: tuple[int, ...]
    stop: int | None
    log_likelihood: float
    score: float


Search = Callable[[Draft, Limits], list[list[Written]]]
"""Writes a draft to its end: for each sample the texts found, the best one first."""


@dataclass(frozen=True)
class Greedy:
    """The likeliest token each time."""

    def __call__(self, draft: Draft, limits: Limits) -> list[list[Written]]:
        return [[text] for text in _write(draft, limits, lambda scores, rows, step: scores.argmax(-1))]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A random token each time, by its probability at a `temperature`, of the `top_k` or the nucleus `top_p` alone.

    `count` texts are drawn for each sample. The random numbers of a text depend on `seed`, the name of its sample and
    which of the texts it is, and not on the batch.

    Raises:
        ValueError: a temperature that is not positive, or an empty choice.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    count: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature}: give one above 0, or use Greedy")
        if (self.top_k is not None and self.top_k < 1) or (self.top_p is not None and not 0 < self.top_p <= 1):
            raise ValueError(f"top_k {self.top_k}, top_p {self.top_p}: keep at least one token, a share in (0, 1]")

    def __call__(self, draft: Draft, limits: Limits) -> list[list[Written]]:
        every = (
            draft if self.count == 1 else draft.select([row for row in range(len(draft)) for _ in range(self.count)])
        )
        seeds = [_seed(self.seed, name, i) for name in draft.names for i in range(self.count)]
        chances = torch.stack([_uniform(seed, limits.max_length) for seed in seeds]).to(draft.scores.device)
        texts = _write(every, limits, lambda scores, rows, step: self.choose(scores, chances[rows, step]))
        return [texts[start : start + self.count] for start in range(0, len(texts), self.count)]

    def probabilities(self, scores: Scores) -> Float[Tensor, "B V"]:
        """How likely each token is chosen."""
        scores = scores / self.temperature
        if self.top_k is not None:
            scores = keep_top(scores, self.top_k)
        if self.top_p is not None:
            scores = keep_nucleus(scores, self.top_p)
        return scores.double().softmax(-1)

    def choose(self, scores: Scores, chance: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The tokens that numbers from [0, 1) stand for."""
        total = self.probabilities(scores).cumsum(-1)
        return torch.searchsorted(total, (chance * total[:, -1])[:, None], right=True)[:, 0]


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


def _uniform(seed: int, count: int) -> Float[Tensor, " n"]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _write(
    draft: Draft, limits: Limits, choose: Callable[[Scores, Int[Tensor, " B"], int], Int[Tensor, " B"]]
) -> list[Written]:
    """Write every text token by token; rows that have ended are dropped when they are half of all."""
    device = draft.scores.device
    ids = torch.full((len(draft), limits.max_length), -1, device=device)
    likelihood = torch.zeros(len(draft), dtype=torch.float64, device=device)
    rows = torch.arange(len(draft), device=device)  # of the texts that the draft still has
    going = torch.ones_like(rows, dtype=torch.bool)
    for step in range(limits.max_length):
        chosen = choose(limits(draft.scores, draft.ids, step), rows, step)
        ids[rows[going], step] = chosen[going]
        gain = draft.scores.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        likelihood[rows] += torch.where(going, gain, 0).double()
        going = going & ~limits.ends(chosen)
        left = int(going.sum())
        if not left or step + 1 == limits.max_length:
            break
        if 2 * left <= len(going):
            kept = going.nonzero()[:, 0]
            draft, rows, chosen = draft.select(kept.tolist()), rows[kept], chosen[kept]
            going = going[kept]
        draft = draft.extend(chosen)
    return [
        _written([id for id in text if id >= 0], limits, score, score)
        for text, score in zip(ids.tolist(), likelihood.tolist(), strict=True)
    ]


def _written(ids: Sequence[int], limits: Limits, log_likelihood: float, score: float) -> Written:
    ended = bool(ids) and ids[-1] in limits.stop
    return Written(
        ids=tuple(ids[:-1] if ended else ids),
        stop=ids[-1] if ended else None,
        log_likelihood=log_likelihood,
        score=score,
    )


@dataclass(frozen=True, kw_only=True)
class Beam:
    """The `width` likeliest texts so far, each time, and of those that ended the `best` by score.

    That is log-likelihood / length^`length_penalty`. The search of a sample ends when `width` texts have, and none that
    goes on scores higher at its present length than the worst of them: as transformers' generate does by default.

    Raises:
        ValueError: no beam, or more texts asked for than there are beams.
    """

    width: int
    length_penalty: float = 1.0
    best: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.best <= self.width:
            raise ValueError(f"the best {self.best} of {self.width} beams: give at least one beam for each text")

    def __call__(self, draft: Draft, limits: Limits) -> list[list[Written]]:
        width, ended = self.width, [_Ended(self) for _ in range(len(draft))]
        first = draft.scores.new_full((len(draft), width), -torch.inf)
        first[:, 0] = 0  # the beams of a sample are still the same: only one counts
        state = _Beams(
            draft=draft.select([row for row in range(len(draft)) for _ in range(width)]),
            sums=first,
            texts=[[[] for _ in range(width)] for _ in range(len(draft))],
            samples=list(range(len(draft))),
        )
        for step in range(limits.max_length):
            state = self._step(state, limits, step, ended)
            if not state.samples:
                break
        return [found.best() for found in ended]

    def _step(self, beams: _Beams, limits: Limits, step: int, ended: list[_Ended]) -> _Beams:
        """All beams with one more token; those that end go to `ended`, and samples that are done are dropped."""
        size = self.width * max(2, 1 + len(limits.stop))
        allowed = limits(beams.draft.scores.log_softmax(-1), beams.draft.ids, step)
        sums = (allowed.unflatten(0, (-1, self.width)) + beams.sums[..., None]).flatten(1)
        values, index = sums.topk(min(size, sums.shape[1]))
        beam, token = index // allowed.shape[1], index % allowed.shape[1]
        last = step + 1 == limits.max_length
        ends = limits.ends(token) | last
        running, chosen = values.masked_fill(ends, -torch.inf).topk(self.width)
        host = zip(beams.samples, values.tolist(), beam.tolist(), token.tolist(), ends.tolist(), strict=True)
        kept, rows, texts = [], [], []
        for row, (sample, sums_of, beam_of, token_of, ends_of) in enumerate(host):
            for i in range(min(self.width, len(sums_of))):  # those behind are spare
                if ends_of[i] and sums_of[i] > -torch.inf:
                    ended[sample].add([*beams.texts[row][beam_of[i]], token_of[i]], sums_of[i], limits)
            if not last and ended[sample].may_improve(float(running[row, 0]), step + 1):
                kept.append(row)
                picks = chosen[row].tolist()
                rows += [row * self.width + beam_of[i] for i in picks]
                texts.append([[*beams.texts[row][beam_of[i]], token_of[i]] for i in picks])
        if not kept:
            return replace(beams, samples=[])
        following = token.gather(1, chosen)[kept].flatten()
        return _Beams(
            draft=beams.draft.select(rows).extend(following),
            sums=running[kept],
            texts=texts,
            samples=[beams.samples[row] for row in kept],
        )


@dataclass(frozen=True, kw_only=True)
class _Beams:
    """Texts that go on: of each sample that is left, `width` rows of the draft, their log-likelihoods and ids."""

    draft: Draft
    sums: Float[Tensor, "S W"]
    texts: list[list[list[int]]]
    samples: list[int]


class _Ended:
    """The best texts of one sample that have ended."""

    def __init__(self, beam: Beam):
        self.beam = beam
        self.texts: list[Written] = []

    def add(self, ids: Sequence[int], log_likelihood: float, limits: Limits) -> None:
        score = log_likelihood / len(ids) ** self.beam.length_penalty
        self.texts.append(_written(ids, limits, log_likelihood, score))
        self.texts = sorted(self.texts, key=lambda text: -text.score)[: self.beam.width]

    def may_improve(self, running: float, length: int) -> bool:
        """Whether the best beam that goes on could take the place of one that ended."""
        if running == -torch.inf:
            return False
        full = len(self.texts) == self.beam.width
        return not full or running / length**self.beam.length_penalty > self.texts[-1].score

    def best(self) -> list[Written]:
        return self.texts[: self.beam.best]
