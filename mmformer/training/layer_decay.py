"""How far below the top of a model each parameter lies: what layer-wise learning-rate decay goes by."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mmformer.encoders import Encoder
from mmformer.model import Model
from mmformer.nn import Transformer

Level = list[nn.Parameter]


def distances(module: nn.Module) -> dict[nn.Parameter, int]:
    """The number of layers above each parameter of the models inside a module; a parameter outside of them has 0.

    From the top: heads, the fusion's pool and last norm (0), its layers (1, 2, ...), its latents and entrances
    together with each encoder's last norm, the encoder's layers, its embedder. So an encoder without a fusion counts as
    in BEiT (arXiv 2106.08254). A parameter with two places, such as a tied table, has the lower one.
    """
    out = dict.fromkeys(module.parameters(), 0)
    for model in module.modules():
        if isinstance(model, Model):
            fusion = [] if model.fusion is None else levels(model.fusion)
            for level, found in _from_top(fusion, 0):
                out |= {p: max(level, out[p]) for p in found}
            for encoder in model.encoders.values():
                for level, found in _from_top(levels(encoder), max(0, len(fusion) - 1)):
                    out |= {p: max(level, out[p]) for p in found}
    return out


def levels(part: nn.Module) -> list[Level]:
    """The parameters of an encoder or a fusion from the bottom: its input side, each layer, what stands above them."""
    if not isinstance(part, Encoder):
        return _around(part)
    out, waiting = [list(part.embedder.parameters())], []
    for stage in part.stages:
        below, *layers, above = _around(stage)
        waiting += below
        for layer in layers:
            out.append(waiting + layer)
            waiting = []
        waiting += above
    if part.pool is not None:
        waiting += part.pool.parameters()
    return [*out, waiting]


def _from_top(found: Sequence[Level], above: int) -> list[tuple[int, Level]]:
    return [(above + i, level) for i, level in enumerate(reversed(found))]


def _around(part: nn.Module) -> list[Level]:
    """What was made before the layers of a part, each layer, what was made after them."""
    layers = [list(layer.parameters()) for layer in _layers(part)]
    inside = {p for layer in layers for p in layer}
    below, above = [], []
    passed = False
    for parameter in part.parameters():
        passed = passed or parameter in inside
        if parameter not in inside:
            (above if passed else below).append(parameter)
    return [below, *layers, above]


def _layers(part: nn.Module) -> list[nn.Module]:
    """The layers of the first Transformer; in a foreign network, the largest list of like parts (`blocks`, `layer`)."""
    for module in part.modules():
        if isinstance(module, Transformer):
            return list(module.layers)
    lists = [module for module in part.modules() if _is_stack(module)]
    return list(max(lists, key=_size).children()) if lists else []


def _is_stack(module: nn.Module) -> bool:
    held = list(module.children())
    alike = isinstance(module, nn.ModuleList | nn.Sequential) and len({type(child) for child in held}) == 1
    # a convolution is no layer of its own
    return alike and len(held) > 1 and all(any(True for _ in child.children()) for child in held)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
