"""Fewer rows in embedding tables: words that the data hardly ever use share one vector."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.checkpoints import SavedModel, build
from mmformer.compress.plain import node, unrolled
from mmformer.encoders import TextEmbedder
from mmformer.heads import VocabularyHead


def occurrences(batches: Iterable[Batch], modality: str, vocab_size: int) -> Int[Tensor, " V"]:
    """How often each id stands in the texts of some samples."""
    total = torch.zeros(vocab_size, dtype=torch.long)
    for batch in batches:
        if modality in batch.inputs:
            total += torch.bincount(batch.inputs[modality].values.cpu(), minlength=vocab_size)
    return total


def fewer_words(saved: SavedModel, counts: Int[Tensor, " V"], least: int, modality: str = "text") -> SavedModel:
    """A model whose table keeps a row for each id that occurs `least` times or is special; all others share one.

    The shared row is the mean of theirs. The tokenizer stays as it is.

    Raises:
        ValueError: a modality without a table of its own, a head that scores its words, or nothing to cut.
    """
    config = unrolled(saved.config["model"])
    path = f"encoders.{modality}.embedder"
    embedder = getattr(dict(saved.model.encoders.named_children()).get(modality), "embedder", None)
    found = node(config, path, embedder) if isinstance(embedder, TextEmbedder) else None
    if not isinstance(embedder, TextEmbedder) or embedder.row is not None or found is None:
        raise ValueError(f"{path} is no TextEmbedder with a row for each word: there is nothing to cut")
    if heads := [name for name, head in saved.model.heads.items() if isinstance(head, VocabularyHead)]:
        raise ValueError(f"the heads {heads} score all words, and could not tell those apart that share a row")
    kept = counts >= least
    kept[list(saved.config["facts"].get("special_ids") or ())] = True
    if int((~kept).sum()) < 2:
        raise ValueError(f"{int((~kept).sum())} of {len(kept)} words occur less than {least} times: nothing to cut")
    model = deepcopy(saved.model)
    part = model.get_submodule(path)
    assert isinstance(part, TextEmbedder)
    _share(part, kept)
    found["rows"] = int(kept.sum()) + 1
    with torch.random.fork_rng(devices=[]):
        rebuilt = build(config, trust=True)
    rebuilt.load_state_dict(model.state_dict())
    compressed = {**saved.config.get("compressed", {}), "rows": [found["rows"], len(kept)]}
    return replace(saved, model=rebuilt.eval(), config={**saved.config, "model": config, "compressed": compressed})


def _share(embedder: TextEmbedder, kept: Tensor) -> None:
    weight = embedder.table.weight.detach()
    shared = torch.full((len(kept),), int(kept.sum()))
    embedder.row = torch.where(kept, kept.cumsum(0) - 1, shared)
    rows = torch.cat([weight[kept], weight[~kept].mean(0, keepdim=True)])
    embedder.table = nn.Embedding.from_pretrained(rows, freeze=False)
