"""Structured pruning: a model with fewer heads, channels and layers, and the config that rebuilds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmformer.batch import Batch
from mmformer.checkpoints import SavedModel, build
from mmformer.compress.costs import Cost, Prices
from mmformer.compress.criteria import Criterion, Scores, Subject, gated
from mmformer.compress.plain import node, unrolled
from mmformer.compress.sites import Layers, Site, find_sites, inside
from mmformer.model import Model


@dataclass(frozen=True)
class Plan:
    """Which units of each site stay, and what the model costs before and after by a price that is additive."""

    sites: tuple[Site, ...]
    kept: tuple[tuple[int, ...], ...]
    before: float
    after: float
    unit: str

    def table(self) -> list[tuple[str, int, int]]:
        """The name of each site, how many units stay and how many there were."""
        pairs = list(zip(self.sites, self.kept, strict=True))
        gone = [(s, i) for s, kept in pairs if isinstance(s, Layers) for i in range(s.count) if i not in kept]
        pairs = [(site, kept) for site, kept in pairs if not any(inside(site, *place) for place in gone)]
        return [(site.paths[0], len(kept), site.count) for site, kept in pairs]


def plan(
    saved: SavedModel, batches: Sequence[Batch], criterion: Criterion, cost: Cost, share: float, *, layers: bool = True
) -> Plan:
    """Choose what stays so that the cost becomes a `share` of what it was, at the least loss of score.

    Greedy: what has the lowest score for what it saves goes first. `layers` allows whole layers to go. `batches` are
    real samples; the first is what the cost is asked on.

    Raises:
        ValueError: a share outside 0 to 1, a model without anything to cut or too little of it, or samples that say
            nothing of what matters.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share}: the cost is to become a share of what it was, between 0 and 1")
    sites = list(find_sites(saved.model, unrolled(saved.config["model"])))
    sites = [site for site in sites if layers or not isinstance(site, Layers)]
    if not sites:
        raise ValueError("this model has no Attention, FeedForward or Transformer of its own to cut")
    scores = criterion(Subject(saved.model, sites, saved.objectives, batches))
    if not any(part.any() for part in scores):
        raise ValueError("no unit has a score: give samples with the targets and the modalities of training")
    prices = cost(saved.model, sites, batches[0])
    kept, after = _greedy(sites, scores, prices, share * prices.total)
    return Plan(tuple(sites), tuple(map(tuple, kept)), prices.total, after, prices.unit)


def prune(saved: SavedModel, chosen: Plan) -> SavedModel:
    """The model with what a plan keeps, in a plain config of its own, which `mmformer.load` opens once it is saved.

    It computes what the model computes under `masked`.
    """
    config = unrolled(saved.config["model"])
    model = deepcopy(saved.model)
    order = sorted(zip(chosen.sites, chosen.kept, strict=True), key=lambda pair: isinstance(pair[0], Layers))
    for site, kept in order:  # layers last, as the names of what is in them count the layers that were
        if len(kept) == site.count:
            continue
        parts = [(path, model.get_submodule(path)) for path in site.paths]
        nodes = [node(config, path, part) for path, part in parts]
        site.cut(model, kept)
        for found in nodes:
            assert found is not None
            site.write(found, kept)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and then overwritten
        rebuilt = build(config, trust=True)
    rebuilt.load_state_dict(model.state_dict())
    compressed = {"sites": [list(line) for line in chosen.table()], "unit": chosen.unit,
                  "share": chosen.after / chosen.before}  # fmt: skip
    whole = {**saved.config, "model": config, "compressed": compressed}
    return replace(saved, model=rebuilt.eval(), config=whole)


def masked(model: Model, chosen: Plan) -> AbstractContextManager[Sequence[Tensor]]:
    """The whole model with what a plan takes out silenced, while this is entered: what pruning is held to."""
    gates = []
    for site, kept in zip(chosen.sites, chosen.kept, strict=True):
        gate = torch.zeros(site.count)
        gate[list(kept)] = 1
        gates.append(gate.to(next(model.parameters()).device))
    return gated(model, chosen.sites, gates)


@dataclass
class _Alive:
    """What is left of a site while units go: blocks of units, the least important last."""

    site: Site
    blocks: list[list[int]]
    score: list[float]
    curve: Float[np.ndarray, " _"]
    count: int

    def saving(self) -> float:
        return float(self.curve[self.count] - self.curve[self.count - len(self.blocks[-1])])

    def density(self) -> float:
        """Score for what it saves; infinite where nothing more may go."""
        if not self.blocks or self.count - len(self.blocks[-1]) < self.site.least or self.saving() <= 0:
            return float("inf")
        return self.score[-1] / self.saving()

    def drop(self) -> float:
        saved = self.saving()
        self.count -= len(self.blocks.pop())
        self.score.pop()
        return saved

    @property
    def kept(self) -> list[int]:
        return sorted(unit for block in self.blocks for unit in block)


def _greedy(sites: Sequence[Site], scores: Scores, prices: Prices, budget: float) -> tuple[list[list[int]], float]:
    alive = [_start(*given) for given in zip(sites, scores, prices.curves, strict=True)]
    gone: dict[int, set[int]] = {i: set() for i, site in enumerate(sites) if isinstance(site, Layers)}
    left = prices.total
    while left > budget:
        cuts = [(part.density(), i, -1) for i, part in enumerate(alive) if i not in gone]
        cuts += _layer_cuts(sites, scores, prices, alive, gone)
        best, i, place = min(cuts)
        if best == float("inf"):
            raise ValueError(
                f"no more can be cut than to {left / prices.total:.0%} of the {prices.unit}, and the budget is "
                f"{budget / prices.total:.0%}: the rest is in parts that are left whole"
            )
        if place < 0:
            left -= alive[i].drop()
        else:
            left -= _layer_saving(sites, prices, alive, i, place)
            gone[i].add(place)
            for j in _inner(sites, i, place):
                alive[j] = replace(alive[j], curve=alive[j].curve * 0)
    kept = [part.kept for part in alive]
    for i, places in gone.items():
        kept[i] = [place for place in range(sites[i].count) if place not in places]
    return kept, left


def _start(site: Site, scores: Float[Tensor, " _"], curve: Float[np.ndarray, " _"]) -> _Alive:
    order = scores.argsort(descending=True, stable=True).tolist()
    blocks = [order[i : i + site.step] for i in range(0, site.count, site.step)]
    values = scores.tolist()
    return _Alive(site, blocks, [sum(values[unit] for unit in block) for block in blocks], curve, site.count)


def _inner(sites: Sequence[Site], i: int, place: int) -> Iterator[int]:
    layers = sites[i]
    assert isinstance(layers, Layers)
    return (j for j, site in enumerate(sites) if j != i and inside(site, layers, place))


def _layer_saving(sites: Sequence[Site], prices: Prices, alive: Sequence[_Alive], i: int, place: int) -> float:
    inner = sum(float(alive[j].curve[alive[j].count]) for j in _inner(sites, i, place))
    return inner + float(prices.rest[i][place])


def _layer_cuts(
    sites: Sequence[Site], scores: Scores, prices: Prices, alive: Sequence[_Alive], gone: dict[int, set[int]]
) -> Iterator[tuple[float, int, int]]:
    """What it would cost in score to take out a whole layer, for each that may go."""
    for i, places in gone.items():
        if sites[i].count - len(places) <= sites[i].least:
            continue
        for place in range(sites[i].count):
            saving = 0.0 if place in places else _layer_saving(sites, prices, alive, i, place)
            if saving > 0:
                yield float(scores[i][place]) / saving, i, place
