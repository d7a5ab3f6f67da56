"""Around the composed config: errors in one line, what a resumed run may change, and modalities the data lack.

Imports nothing heavy: `train.py --help` passes through here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

CONFIG_ERRORS = (HydraException, OmegaConfBaseException)

LATENT = "latent"  # the name in mmformer.tokens, which would import torch here

FIXED = ("seed", "data", "module.model", "module.objectives", "module.seed", "module.finetune", "facts")
"""What a run cannot change half-way: its result would be neither the old run nor a new one."""

FREE = (
    *("resume", "allow_changes", "ckpt_path", "pretrained", "origins", "paths", "logger", "extras", "task_name"),
    *("tags", "fit", "test", "trainer.devices", "trainer.enable_progress_bar", "data.loader.num_workers"),
    *("data.loader.timeout", "data.loader.prefetch_factor", "data.loader.pin_memory", "data.max_bad_fraction"),
    "callbacks",
)
"""What a resumed run may change without a word."""


def one_line(error: BaseException, known: Sequence[str] = ()) -> str:
    """An error of Hydra's as one line that names the key and, for a misspelt one, the nearest there is.

    `known` are dotted keys of the config, where it could be composed without the overrides.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, wanted = error.missing_cfg_file.rpartition("/")
        options = list(error.options or ())
        return f"no option {wanted!r} in group {group!r}{_nearest(wanted, options)}; there are: {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r}: {_first_line(error)}"
    if isinstance(error, ConfigCompositionException):
        key = _quoted(_first_line(error))
        return f"no key {key!r} in the config{_nearest(key, known)}" if key else _first_line(error)
    if isinstance(error, InstantiationException):
        return _instantiation(error)
    if isinstance(error, InterpolationResolutionError):
        return _first_line(error).rpartition("raised while resolving interpolation: ")[-1]
    return " ".join(str(error).split())


def _instantiation(error: InstantiationException) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    place = [line.removeprefix("full_key: ") for line in str(error).splitlines() if line.startswith("full_key: ")]
    where = f"{place[0]}: " if place and place[0] else ""
    return where + " ".join(str(cause).split())


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _quoted(text: str) -> str | None:
    parts = text.split("'")
    return parts[1].removeprefix("+") if len(parts) > 2 else None


def _nearest(word: str, options: Sequence[str]) -> str:
    """`; did you mean ...?` by whole key, else by the last part of it."""
    if word in options:
        return f" with these keys in it; a key more is +{word}.<key>=<value>"
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.75)
    if not close:
        tails = {option.rsplit(".", 1)[-1]: option for option in reversed(options)}
        close = [tails[t] for t in difflib.get_close_matches(word.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.75)]
    return f"; did you mean {close[0]!r}?" if close else ""


def dotted_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a nested mapping, with dots."""
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=False)
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield f"{prefix}{key}"
            yield from dotted_keys(value, f"{prefix}{key}.")


def missing(config: Any) -> list[str]:
    """Keys that must be given and are not (`???`), where they stand and not where they are pointed at."""
    plain = OmegaConf.to_container(config, resolve=False)
    return [key for key, value in _leaves(plain).items() if value == "???"]


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(config, Mapping) and config:
        return {k: v for key, value in config.items() for k, v in _leaves(value, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): config}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two plain configs, as lines `key: old -> new`: what may change, and what must not."""
    old, new = _leaves(before), _leaves(now)
    allowed, refused = [], []
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) == new.get(key) or _under(key, FREE):
            continue
        line = f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        (refused if _under(key, FIXED) else allowed).append(line)
    return allowed, refused


def _under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def drop_absent(config: Any, modalities: Sequence[str]) -> list[str]:
    """Take out of a config what it cannot have: encoders of modalities that the data lack, and all that needs them.

    The fusion keeps the names that have an encoder; an objective that reads a dropped modality goes, with its head.
    Returns the modalities that were dropped. `config` is a DictConfig, and is changed.
    """
    model = config.module.model
    dropped = [name for name in model.encoders if name not in modalities]
    kept = {LATENT, *model.encoders} - set(dropped)
    with open_dict(config):
        for name in dropped:
            del model.encoders[name]
        for key in ("stream", "context"):
            if model.get("fusion") and model.fusion.get(key):
                model.fusion[key] = [name for name in model.fusion[key] if name in kept]
        _drop_objectives(config.module, dropped)
    return dropped


def _drop_objectives(module: Any, dropped: Sequence[str]) -> None:
    gone = [name for name, objective in module.objectives.items() if objective.get("source") in dropped]
    heads = {module.objectives[name].get("head") for name in gone}
    for name in gone:
        del module.objectives[name]
        module.weights.pop(name, None)
    for head in heads - {objective.get("head") for objective in module.objectives.values()}:
        module.model.heads.pop(head, None)
    for objective in module.objectives.values():
        if objective.get("modalities"):
            objective.modalities = [name for name in objective.modalities if name not in dropped]
