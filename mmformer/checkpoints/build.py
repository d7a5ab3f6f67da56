"""Building parts from a config that someone else may have written: only parts of a model, never any callable.

Hydra's `instantiate` calls whatever `_target_` names, `os.system` too. A config that comes with weights is data, so
each of its targets must be defined in a module of the allow-list. What counts is where a target is *defined*, not how
it is spelt: `mmformer.nn.attention.os.system` starts well and ends in `posix`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pkgutil import resolve_name
from typing import Any

PARTS = (
    "mmformer.batch",
    "mmformer.codec",
    "mmformer.datasets",
    "mmformer.encoders",
    "mmformer.fusion",
    "mmformer.generation",
    "mmformer.heads",
    "mmformer.losses",
    "mmformer.model",
    "mmformer.nn",
    "mmformer.objectives",
    "mmformer.patterns",
    "mmformer.pooling",
    "mmformer.tokens",
    "mmformer.visibility",
    "torch.nn",
    "torch._C._nn",  # where torch.nn.functional.gelu and others are defined
    "functools.partial",
)
"""Modules whose classes and functions a saved config may name."""

LOOKUPS = frozenset({"hydra.utils.get_class", "hydra.utils.get_method", "hydra.utils.get_object"})
"""Targets that only look their `path` up, which must be allowed itself."""


class RefusedTarget(ValueError):
    """A config that names something outside the allow-list."""


def build(config: Any, allow: Sequence[str] = (), trust: bool = False, origin: str = "the config") -> Any:
    """What a plain config describes, every `_target_` of it checked first; `origin` names it in errors.

    `allow` adds packages ("my_package") to the allow-list, `trust` turns the check off.

    Raises:
        RefusedTarget: a target outside the allow-list, or an interpolation such as `${oc.env:...}`.
        ValueError: a target that does not exist, or does not take the arguments it is given.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    allowed = (*PARTS, *(name.rstrip(".") for name in allow))
    if not trust:
        for target in _targets(config, origin):
            _check(target, allowed, origin)
    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{origin} does not fit this version of mmformer ({' '.join(str(cause).split())}): "
            "use the version that wrote it"
        ) from error


def _targets(config: Any, origin: str) -> Iterator[str]:
    """Every target of a nested config."""
    if isinstance(config, dict):
        target = config.get("_target_")
        if target in LOOKUPS:
            yield str(config.get("path"))
        elif target is not None:
            yield str(target)
        for value in config.values():
            yield from _targets(value, origin)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _targets(value, origin)
    elif isinstance(config, str) and "${" in config:
        raise RefusedTarget(f"{origin} holds the interpolation {config!r}: a saved config must be resolved")


def _check(target: str, allowed: Sequence[str], origin: str) -> None:
    refusal = (
        f"{origin} asks for {target}, which is no part of mmformer. If you trust it, name its package, "
        f"allow=[{target.split('.')[0]!r}], or pass trust=True"
    )
    if not _inside(target, allowed):
        raise RefusedTarget(refusal)
    try:
        found = resolve_name(target)
    except Exception as error:  # whatever importing a module may raise
        raise ValueError(f"{origin} asks for {target}, which cannot be imported: {error}") from error
    module = getattr(found, "__module__", None)
    place = f"{module}.{getattr(found, '__qualname__', '')}"
    # A method could be given an object of the config's making to work on: `save` to any file, for one.
    whole = "." not in getattr(found, "__qualname__", ".")
    if not callable(found) or not whole or not module or not _inside(place, allowed):
        raise RefusedTarget(f"{refusal} (it is defined in {module})")


def _inside(name: str, allowed: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)
