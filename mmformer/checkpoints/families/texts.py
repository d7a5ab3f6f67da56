"""What the descriptions of all language models share: settings, rotations, layer patterns, tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmformer.checkpoints.families import parts
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Rule

TEXT, STACK, LAYER = "encoders.text", "encoders.text.stages.0", "encoders.text.stages.0.layers.{i}"
TABLE, SCORES = f"{TEXT}.embedder.table.weight", "heads.vocabulary.out"

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Files that a tokenizer is read from, the first one that is there."""


def settings(source: Source, options: Mapping[str, Any], *needed: str) -> Config:
    """The config of the checkpoint, with `options` in the place of what it says or leaves open.

    Raises:
        ValueError: one of `needed` is in neither.
    """
    config = {**source.config, **options}
    for name in needed:
        if config.get(name) is None:
            raise parts.lacks(source, name)
    return config


def refuse(source: Source, config: Config, **wanted: Any) -> None:
    """Stop at a setting that has another value than the only one mmformer computes, if the config says it at all.

    Raises:
        ValueError: such a setting.
    """
    for name, value in wanted.items():
        if (found := config.get(name, value)) != value:
            raise ValueError(f"{source.origin} has {name}: {found!r}, of which mmformer knows {value!r} alone")


def prefix(source: Source, *choices: str) -> str:
    """The one of these that names of the file start with; "" if none does."""
    return next((choice for choice in choices if any(name.startswith(choice) for name in source.tensors)), "")


def tokenizer(source: Source) -> Path | None:
    """The file to read the tokenizer from, of those beside the weights."""
    return next((source.files[name] for name in TOKENIZERS if name in source.files), None)


def features(max_length: int, *, begin: bool = False, end: bool = False) -> Config:
    """How texts become ids, with the tokenizer's own tokens around them; it is given when the factory is called."""
    return {
        "text": parts.factory("mmformer.datasets.features.Text", max_length=max_length, begin=begin, end=end),
    }


def visibility(**rule: Any) -> Config:
    """Who sees whom, as in `mmformer.visibility.Visibility`."""
    return parts.part("mmformer.visibility.Visibility", **rule)


def vocabulary(dim: int, vocab_size: int, *, tied: bool, **options: Any) -> Config:
    """A head over the vocabulary; options as in `mmformer.heads.VocabularyHead`."""
    return parts.part(
        "mmformer.heads.VocabularyHead", dim=dim, vocab_size=vocab_size, tied="text" if tied else None, **options
    )


def scores(source: Source, dim: int, vocab_size: int, tied: bool) -> dict[str, Config]:
    """The head of a decoder, if its weight is stored or is the table of the embeddings."""
    if not tied and not source.has("lm_head.weight"):
        return {}
    return {"vocabulary": vocabulary(dim, vocab_size, tied=tied, bias=False)}


def linear(dim_in: int, dim_out: int, bias: bool = True) -> Config:
    """A linear map."""
    return parts.part("torch.nn.Linear", in_features=dim_in, out_features=dim_out, bias=bias)


def built(factory: Config, **options: Any) -> Config:
    """What a factory makes, in its place."""
    return {key: value for key, value in factory.items() if key != "_partial_"} | options


def sequence(*steps: Config) -> Config:
    """One part after the other."""
    return parts.part("torch.nn.Sequential", _args_=list(steps))


def repeating(layers: Sequence[Config]) -> list[Config]:
    """The shortest pattern whose repetition is these layers."""
    lengths = range(1, len(layers) + 1)
    found = next((n for n in lengths if all(layer == layers[i % n] for i, layer in enumerate(layers))), 0)
    return list(layers[:found])


def rotary(source: Source, said: Mapping[str, Any]) -> Config:
    """The factory of rotary positions from `rope_parameters`, or from `rope_theta` and `rope_scaling` as one.

    Raises:
        ValueError: a kind of scaling that mmformer does not have, or a share of the channels that stays unrotated.
    """
    kind = said.get("rope_type", said.get("type", "default"))
    if said.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"{source.origin} rotates {said['partial_rotary_factor']} of the channels: only 1 is supported"
        )
    scaling = None
    if kind == "linear":
        scaling = parts.part("mmformer.nn.LinearScaling", factor=said["factor"])
    elif kind == "llama3":
        scaling = parts.part(
            "mmformer.nn.BandScaling",
            factor=said["factor"],
            low=said["low_freq_factor"],
            high=said["high_freq_factor"],
            original=said["original_max_position_embeddings"],
        )
    elif kind != "default":
        known = "mmformer has default, linear and llama3"
        raise ValueError(
            f"{source.origin} has rope_type {kind!r}: {known}; options={{'rope_parameters': ...}} change it"
        )
    return parts.factory("mmformer.nn.Rotary", theta=said["rope_theta"], scaling=scaling)


def stored(source: Source, *names: str) -> list[str]:
    """Those of the names that the file has: weights that most files leave out, as they are tied to others."""
    return [name for name in names if source.has(name)]


def if_stored(described: Described, name: str, target: str) -> list[Rule]:
    """The rule for such a weight; without it, the way back does not write it either."""
    return [Rule((name,), (target,))] if name in described.layout["stored"] else []
