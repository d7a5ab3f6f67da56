"""Hits ranked anew by a model that looks at query and hit together: ALBEF's second step (arXiv 2107.07651, section 5).

hits = index.search(query, 10, model=.., rerank=by_matching(model, {"text": "a dog"}, ["rows.csv"]), depth=64)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmformer.batch import Batch
from mmformer.datasets.dataset import collate
from mmformer.datasets.manifest import Manifest
from mmformer.datasets.tables import ManifestError
from mmformer.judging import Judging
from mmformer.predict import Predictor
from mmformer.search.index import Hit, Rerank
from mmformer.search.rows import MODALITY


def judged_with(predictor: Predictor, sample: Mapping[str, Any]) -> list[str]:
    """The modalities of rows that a query can be judged with.

    Raises:
        ValueError: a model that judges no pairs, or a query of several modalities or of one that it does not judge.
    """
    if len(sample) != 1:
        raise ValueError(f"pairs are judged, so a query is one thing: this one has {' and '.join(sample)}")
    return Judging.of(predictor.model, predictor.objectives).partners(next(iter(sample)))


def by_matching(predictor: Predictor, sample: Mapping[str, Any], manifests: Sequence[Path | str]) -> Rerank:
    """Scores of hits by the matching head of a model: its logit, and the share of the similarity that it was given.

    `sample` is the query, of one modality. The hits are read again from the `manifests` that were indexed.

    Raises:
        ValueError: as `judged_with`; later, for a hit that cannot be judged or that no manifest has.
    """
    (asking,), partners = sample, judged_with(predictor, sample)
    judging = Judging.of(predictor.model, predictor.objectives)
    query = {name: str(given) if isinstance(given, Path) else given for name, given in sample.items()}
    read = [predictor.manifest(path, labelled=False) for path in manifests]
    places = {manifest.id(row): (manifest, row) for manifest in reversed(read) for row in range(len(manifest))}

    def value(hit: Hit) -> Any:
        asked = hit.row[MODALITY]
        if asked not in partners:
            raise ValueError(
                f"hit {hit.id!r} is of modality {asked!r}, and this model judges {asking} beside "
                f"{', '.join(partners)}: leave out the others with where={{'{MODALITY}': ..}}"
            )
        if hit.id not in places:
            files = ", ".join(str(manifest.path) for manifest in read) or "no manifest"
            raise ManifestError(f"hit {hit.id!r} is not in {files}: name the manifest that was indexed")
        return _value(*places[hit.id], asked)

    def score(batch: Batch, asked: str, hits: Sequence[Hit]) -> list[float]:
        if batch.faults:
            fault = batch.faults[0]
            raise ValueError(f"{fault.column} of {fault.id}: {fault.reason}")
        tokens = judging.read(batch.to(predictor.device))
        pairs = {asking: [0] * len(hits), asked: list(range(1, 1 + len(hits)))}
        found = judging.logits(tokens, pairs)[:, 1].tolist()
        return [logit + judging.matching.share * hit.score for logit, hit in zip(found, hits, strict=True)]

    def rerank(number: int, hits: Sequence[Hit]) -> list[float]:
        scores: dict[int, float] = {}
        for asked in dict.fromkeys(hit.row[MODALITY] for hit in hits):
            chosen = [i for i, hit in enumerate(hits) if hit.row[MODALITY] == asked]
            for start in range(0, len(chosen), predictor.batch_size):
                part = chosen[start : start + predictor.batch_size]
                values = [query, *({asked: value(hits[i])} for i in part)]
                batch = collate(values, predictor.features, ["the query", *(hits[i].id for i in part)])
                scores |= zip(part, score(batch, asked, [hits[i] for i in part]), strict=True)
        return [scores[i] for i in range(len(hits))]

    return rerank


def _value(manifest: Manifest, row: int, modality: str) -> Any:
    if modality not in manifest.inputs:
        raise ManifestError(f"{manifest.path} has no {modality}: name the manifest that was indexed")
    return manifest.text(row, modality) if modality == "text" else manifest.source(modality, row)
