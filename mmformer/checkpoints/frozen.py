"""Weights that never change, kept once beside the checkpoints of a run and not again in each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = "frozen"
"""Entry of a checkpoint: `names` of what never changes and the `sha256` of its content; on the disk also its `file`."""


class FrozenError(ValueError):
    """The frozen weights that a checkpoint builds on are absent or damaged."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and numbers; memory that two names share counts once."""
    found, seen = hashlib.sha256(), set()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            numbers: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            found.update(numbers)
    return found.hexdigest()


def describe(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Any]:
    """What `set_apart` must know, for a checkpoint's entry `frozen`."""
    chosen = sorted(names)
    return {"names": chosen, "sha256": digest({name: state[name] for name in chosen})}


def set_apart(checkpoint: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Path | None, dict[str, Tensor]]:
    """A checkpoint without its frozen tensors, the file that is to hold them, and them; no file where nothing is."""
    about = checkpoint.get(KEY)
    if not about or not about["names"]:
        return checkpoint, None, {}
    state = checkpoint["state_dict"]
    tensors = {name: state[name] for name in about["names"]}
    kept = {name: tensor for name, tensor in state.items() if name not in tensors}
    file = folder / f"frozen-{about['sha256'][:16]}.pt"
    return checkpoint | {"state_dict": kept, KEY: about | {"file": file.name}}, file, tensors


def put_back(checkpoint: dict[str, Any], path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint read from `path` with its frozen tensors, from the file beside it, checked.

    Raises:
        FrozenError: that file is absent, damaged or another one.
    """
    about = checkpoint.get(KEY)
    if not isinstance(about, dict) or "file" not in about:  # others may call something else frozen
        return checkpoint
    file = path.parent / Path(about["file"]).name
    if not file.is_file():
        raise FrozenError(
            f"{path} holds only what was trained, and {file.name} with the frozen weights is not beside it: "
            "copy both, or use the run's model/ folder, which is whole"
        )
    try:
        tensors = torch.load(file, map_location=map_location, weights_only=True)
        found = digest(tensors)
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError here
        raise FrozenError(f"{file} with the frozen weights of {path} cannot be read: {error}") from error
    if found != about["sha256"]:
        raise FrozenError(
            f"{file} is damaged: its content is {found[:12]}... and {path} was saved with {about['sha256'][:12]}...: "
            "copy it again from where the run was made"
        )
    return checkpoint | {"state_dict": checkpoint["state_dict"] | tensors}
