"""Texts that a model writes behind what a sample has.

texts = generate(model, batch, Limits(max_length=20, stop=(EOS,)), Beam(width=3))
scores = rank(Writer(model=model).read(batch), answers, first=128)
"""

from __future__ import annotations

import torch

from mmformer.batch import Batch
from mmformer.generation.draft import Draft, Writer
from mmformer.generation.limits import Limits
from mmformer.generation.rank import rank
from mmformer.generation.search import Beam, Greedy, Sampling, Search, Written
from mmformer.model import Model

__all__ = ["GREEDY", "Beam", "Draft", "Greedy", "Limits", "Sampling", "Search", "Writer", "Written", "generate", "rank"]

GREEDY = Greedy()


@torch.inference_mode()
def generate(model: Model, batch: Batch, limits: Limits, search: Search = GREEDY) -> list[list[Written]]:
    """For each sample of a batch the texts that a search finds, the best one first.

    What a sample has of the text is its prompt, all else its context. With another head, modality or sequence, or where
    the context is encoded already, it is `search(Writer(..).read(batch, encoded), limits)`.
    """
    return search(Writer(model=model).read(batch), limits)
