"""Texts that a model writes behind what a sample has.

texts = generate(model, batch, Limits(max_length=20, stop=(EOS,)), Beam(width=3))
scores = rank(Writer(model=model).read(batch), answers, first=128)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mmformer.batch import Batch
from mmformer.generation.draft import Draft, Writer
from mmformer.generation.limits import Limits
from mmformer.generation.rank import rank
from mmformer.generation.search import Beam, Greedy, Sampling, Search, Written
from mmformer.model import Model
from mmformer.tokens import Tokens
from mmformer.visibility import Visibility

__all__ = ["GREEDY", "Beam", "Draft", "Greedy", "Limits", "Sampling", "Search", "Writer", "Written", "generate", "rank"]

GREEDY = Greedy()


@torch.inference_mode()
def generate(
    model: Model,
    batch: Batch,
    limits: Limits,
    search: Search = GREEDY,
    *,
    head: str = "vocabulary",
    modality: str = "text",
    source: str | None = None,
    visibility: Visibility | None = None,
    encoded: Mapping[str, Tokens] | None = None,
) -> list[list[Written]]:
    """For each sample of a batch the texts that a search finds, the best one first.

    What a sample has of `modality` is its prompt, all else its context. Options as in `Writer`; `encoded` has tokens of
    the context where they are known.
    """
    writer = Writer(model=model, head=head, modality=modality, source=source, visibility=visibility)
    return search(writer.read(batch, encoded), limits)
