"""Zero-shot classification: a class is what a model makes of sentences that name it (CLIP, arXiv 2103.00020, 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmformer.metrics.retrieval import first_ranks

PLAIN = ("{}",)
"""The name itself, for models that were trained on names."""
PICTURES = ("a photo of a {}.", "a picture of a {}.", "a drawing of a {}.", "a close-up of a {}.", "this is a {}.")
SOUNDS = ("the sound of {}.", "a recording of {}.", "this is {}.")


def class_vectors(
    embed: Callable[[list[str]], Float[Tensor, "N D"]], names: Sequence[str], templates: Sequence[str] = PLAIN
) -> Float[Tensor, "C D"]:
    """One unit vector for each class: the mean direction of its name in every template, `{}` standing for the name.

    Raises:
        ValueError: no class, no template, or one without `{}`.
    """
    if not names or not templates:
        raise ValueError(f"{len(names)} classes and {len(templates)} templates: give at least one of both")
    if wrong := [template for template in templates if "{}" not in template]:
        raise ValueError(f"template {wrong[0]!r} has no place for the name: write {{}} where it goes")
    sentences = [template.replace("{}", name) for name in names for template in templates]
    vectors = normalize(embed(sentences).float(), dim=-1)
    return normalize(vectors.unflatten(0, (len(names), len(templates))).mean(1), dim=-1)


def class_ranks(vectors: Float[Tensor, "N D"], classes: Float[Tensor, "C D"], target: Int[Tensor, " N"]) -> Tensor:
    """The rank, from 1, that the right class has for each sample; of equal scores as in `retrieval.first_ranks`."""
    every = torch.arange(len(classes), device=target.device)
    return first_ranks(normalize(vectors.float(), dim=-1) @ classes.T, target[:, None] == every)


def top_accuracy(ranks: Float[Tensor, " N"], k: int = 1) -> float:
    """The share of samples whose right class is among the first k."""
    return float((ranks <= k).double().mean())
