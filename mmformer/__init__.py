"""Train one Transformer over any mix of text, images and audio.

Importing the package imports nothing else: torch comes with the first attribute that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmformer.predict import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

_HOME = {"load": "mmformer.predict"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"mmformer has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
