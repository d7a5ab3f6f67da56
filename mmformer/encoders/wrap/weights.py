"""Where weights come from: a file, a folder or a hub's id; and libraries that may be absent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def library(name: str) -> Any:
    """Import an optional library.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ImportError(f"{error.name} is not installed: pip install 'mmformer[{error.name}]'") from error


def local(weights: str) -> Path | None:
    """The file or folder that `weights` names; None for what only a hub can know.

    Raises:
        FileNotFoundError: it reads like a path, and nothing is there.
    """
    path = Path(weights).expanduser()
    if path.exists():
        return path
    if path.suffix in WEIGHT_FILES or not HUB_ID.fullmatch(weights):
        raise FileNotFoundError(f"weights {weights!r}: no such file or folder, and no id of a hub (owner/name)")
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name; what code a pickle holds is refused, not run.

    Raises:
        ValueError: a file that holds something else than tensors by name.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        kind = sorted(map(str, found))[:5] if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path} holds {kind}, not tensors by name: save the state_dict alone")
    return found


def fill(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy tensors into a module that has exactly these.

    Raises:
        ValueError: a tensor too many, too few or of another shape; nothing was copied then.
    """
    own = module.state_dict()
    wrong = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in tensors]
    wrong += [f"unexpected {name} {tuple(tensors[name].shape)}" for name in tensors if name not in own]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, here {tuple(own[name].shape)}"
        for name in own
        if name in tensors and own[name].shape != tensors[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{origin} does not fit {type(module).__name__}: {'; '.join(wrong[:8])}{more}")
    module.load_state_dict(dict(tensors))
