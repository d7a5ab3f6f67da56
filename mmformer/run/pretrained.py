"""Weights from another run, without its optimizer or its place in the data."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from mmformer.run.launch import UserError
from mmformer.training.checkpointing import load_whole


def load_pretrained(model: nn.Module, path: Path, strict: bool) -> list[str]:
    """Load a model's weights from a checkpoint, a run folder or safetensors; gives back what to say of it.

    Raises:
        UserError: nothing there, or with `strict` a weight that is missing, unexpected or of another shape.
    """
    found = _weights(path)
    own = model.state_dict()
    missing = [name for name in own if name not in found]
    unexpected = [name for name in found if name not in own]
    other = [name for name in found if name in own and found[name].shape != own[name].shape]
    lists = [
        *_list("missing", missing),
        *_list("unexpected", unexpected),
        *_list("of another shape", [f"{n} {_shape(found[n])}, here {_shape(own[n])}" for n in other]),
    ]
    fitting = {name: tensor for name, tensor in found.items() if name in own and name not in other}
    if not fitting or (strict and lists):
        raise UserError(
            f"pretrained={path} does not fit this model: {'; '.join(lists) or 'no weight in common'}"
            + ("; pretrained_strict=false loads what fits" if fitting else "")
        )
    model.load_state_dict(fitting, strict=False)
    share = sum(t.numel() for t in fitting.values()) / max(1, sum(t.numel() for t in own.values()))
    return [*lists, f"pretrained: {len(fitting)} tensors, {share:.0%} of the weights, from {path}"]


def _weights(path: Path) -> dict[str, Tensor]:
    """The weights of a model by their names in it; the averaged ones where a checkpoint has them."""
    places = [
        path,
        path / "model" / "model.safetensors",
        path / "model.safetensors",
        path / "checkpoints" / "best.ckpt",
    ]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"pretrained={path}: no checkpoint (.ckpt), run folder or folder with model.safetensors")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    state = load_whole(file)["state_dict"]
    prefix = "average.module.model." if any(name.startswith("average.") for name in state) else "model."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _list(what: str, names: list[str]) -> list[str]:
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return [f"{len(names)} {what}: {shown}"] if names else []


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
