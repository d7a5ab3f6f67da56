"""Low-rank adapters beside the linear maps of a model, by the library peft."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Add to a linear map W the product of two narrow ones, W + alpha / rank * B A (LoRA, arXiv 2106.09685).

    `targets` are patterns of the names of linear maps: "*.layers.*", or "*.qkv" for less. B starts at 0, so a model
    with new adapters is the model without.

    Raises:
        ImportError: peft is not installed.
        ValueError: from the call, where a pattern matches no linear map.
    """

    rank: int
    alpha: int
    dropout: float
    targets: Sequence[str]

    def __post_init__(self) -> None:
        if find_spec("peft") is None:
            raise ImportError("LoRA needs the library peft: pip install 'mmformer[peft]'")

    def __call__(self, model: nn.Module) -> None:
        """Change a model in place: its own parameters are frozen, the adapters train."""
        from peft import LoraConfig, inject_adapter_in_model

        names = self._linear_maps(model)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="|".join(map(re.escape, names)),
        )
        inject_adapter_in_model(config, model)

    def _linear_maps(self, model: nn.Module) -> list[str]:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        chosen: dict[str, None] = {}
        for pattern in self.targets:
            found = [name for name in linear if fnmatchcase(name, pattern)]
            if not found:
                shown = ", ".join(linear[:8])
                raise ValueError(f"LoRA's target {pattern!r} matches no linear map; there are {len(linear)}: {shown}")
            chosen |= dict.fromkeys(found)
        return list(chosen)


def merge(model: nn.Module) -> None:
    """Add the adapters to the weights they stand beside, in place: no cost in use any more. `unmerge` takes it back."""
    for _, layer in _adapted(model):
        layer.merge(safe_merge=True)


def unmerge(model: nn.Module) -> None:
    """Subtract merged adapters again; the weights are then equal to the former ones up to rounding."""
    for _, layer in _adapted(model):
        layer.unmerge()


def merged(model: Module) -> Module:
    """A model without adapters that computes the same; the model itself where it has none.

    The given model is left as it is. What no adapter stands beside is shared with it, not copied.
    """
    adapted = list(_adapted(model))
    if not adapted:
        return model
    own = {parameter for _, layer in adapted for parameter in layer.parameters()}
    plain = deepcopy(model, {id(p): p for p in model.parameters() if p not in own})
    for name, layer in list(_adapted(plain)):
        layer.merge(safe_merge=True)
        plain.set_submodule(name, layer.get_base_layer())
    plain.__dict__.pop("peft_config", None)  # what peft remembers of its work
    return plain


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that peft put in place of linear maps; without peft there is none, and it need not be imported."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module
