"""Objectives that compare what stands inside two models: hidden states, where their energy lies, attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mmformer.batch import Batch
from mmformer.losses.distill import attention_transfer, relations
from mmformer.model import Encoded, Model
from mmformer.nn import Attention
from mmformer.objectives import ranks
from mmformer.objectives.objective import Objective, without
from mmformer.objectives.teacher import lessons
from mmformer.tokens import Tokens, to_padded


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A layer, the tokens that went in, and the tokens that came out where its result is tokens."""

    layer: nn.Module
    given: Tokens
    made: Any


class Trace:
    """What watched layers of one model saw, kept no longer than the tokens that came of it.

    Layers are named as submodules of an encoder ("encoders.image.stages.0.layers.1") or of the fusion.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._parts: set[str] = set()
        self._open: dict[str, Seen] = {}
        self._kept: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @staticmethod
    def on(model: Model) -> Trace:
        """The trace of a model, which copies of it have anew."""
        return model.__dict__.setdefault("_trace", Trace())

    def __deepcopy__(self, memo: dict) -> Trace:
        made = memo[id(self)] = Trace()
        made._names, made._parts = set(self._names), set(self._parts)
        return made

    def watch(self, model: Model, names: Iterable[str]) -> bool:
        """Watch further layers from now on; gives back whether some are new.

        Raises:
            ValueError: a name that the model does not have.
        """
        new = [name for name in dict.fromkeys(names) if name not in self._names]
        for name in new:
            _submodule(model, name).register_forward_hook(partial(self._see, name))
            self._names.add(name)
            if (part := _part(name)) not in self._parts:
                _submodule(model, part).register_forward_hook(self._close)
                self._parts.add(part)
        return bool(new)

    def _see(self, name: str, layer: nn.Module, inputs: tuple, output: Any) -> None:
        self._open[name] = Seen(layer=layer, given=inputs[0], made=output)

    def _close(self, part: nn.Module, inputs: tuple, output: Tokens) -> None:
        self._kept[output.x], self._open = self._open, {}

    def of(self, model: Model, encoded: Encoded, name: str) -> Seen | None:
        """What a layer saw on the way to what is encoded, or fused of that; None where the batch lacks the modality."""
        part = _part(name)
        if part == "fusion":
            tokens = model.fuse(encoded)
        elif (modality := part.partition(".")[2]) in encoded:
            tokens = encoded[modality]
        else:
            return None
        return self._kept[tokens.x][name]


def compared(
    model: Model, encoded: Encoded, batch: Batch, layers: Mapping[str, str], teacher: int
) -> tuple[Float[Tensor, ""], list[tuple[Seen, Seen] | None]]:
    """What layers of a student and of a teacher saw of a batch, and how much that teacher counts.

    Raises:
        ValueError: the two did not see the same places.
    """
    lesson = lessons(encoded, batch)[teacher]
    theirs = Trace.on(lesson.model)
    if theirs.watch(lesson.model, layers.values()):
        lesson.reread()
    pairs: list[tuple[Seen, Seen] | None] = []
    for name, taught_name in layers.items():
        said = Trace.on(model).of(model, encoded, name)
        with torch.no_grad():
            taught = theirs.of(lesson.model, lesson.encoded, taught_name)
        pairs.append(None if said is None or taught is None else (said, taught))
        if said is not None and taught is not None and said.given.layout != taught.given.layout:
            mine, other = ([] if s.given.layout is None else s.given.layout.lengths[:4] for s in (said, taught))
            raise ValueError(
                f"{name} works on sequences of {mine} tokens, the teacher's {taught_name} of {other}: compare layers "
                "of one modality that is cut alike, or what has a row a sample (TaughtOutput, TaughtRelations)"
            )
    return lesson.weight, pairs


class TaughtStates(Objective):
    """Hidden states that a learned linear map brings to a teacher's (FitNets, arXiv 1412.6550).

    `layers` names layers of the student, each with that of the teacher it learns from; both must give tokens of the
    same places. States are compared by squared error, the mean over channels and tokens, with the teacher's brought to
    mean 0 and variance 1 (arXiv 2205.14141), which makes layers comparable. `dim` and `taught_dim` are the channels.
    With several teachers in front, `teacher` says whose they are.
    """

    by_subset = False

    def __init__(self, layers: Mapping[str, str], dim: int, taught_dim: int, *, teacher: int = 0):
        super().__init__()
        self.layers, self.dims, self.teacher = dict(layers), (dim, taught_dim), teacher
        self.maps: nn.ModuleList | None = None

    def prepare(self, model: Model) -> None:
        self.maps = nn.ModuleList(nn.Linear(*self.dims) for _ in self.layers)
        Trace.on(model).watch(model, self.layers)

    def exported(self) -> TaughtStates:
        return without(self, "maps")

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        if self.maps is None:
            raise ValueError("the maps were not made: call prepare(model) once the model has its weights")
        weight, pairs = compared(model, encoded, batch, self.layers, self.teacher)
        losses = []
        for pair, to_teacher in zip(pairs, self.maps, strict=True):
            if pair is None:
                losses.append(ranks.shared_mean(ranks.nothing(to_teacher), 0))
                continue
            said, taught = pair[0].made, pair[1].made
            wanted = F.layer_norm(taught.x.float(), taught.x.shape[-1:])
            far = (to_teacher(said.x).float() - wanted).square().mean(-1)
            losses.append(ranks.shared_mean((far * said.valid).sum(), said.valid.sum()))
        return {"loss": weight * torch.stack(losses).mean()}


class TaughtEnergy(Objective):
    """Tokens whose energy lies where a teacher's does: activation-based attention transfer (arXiv 1612.03928).

    `layers` and `teacher` as in `TaughtStates`; the widths may differ. The mean over samples and layers.
    """

    by_subset = False

    def __init__(self, layers: Mapping[str, str], *, teacher: int = 0):
        super().__init__()
        self.layers, self.teacher = dict(layers), teacher

    def prepare(self, model: Model) -> None:
        Trace.on(model).watch(model, self.layers)

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        weight, pairs = compared(model, encoded, batch, self.layers, self.teacher)
        losses = []
        for pair in pairs:
            if pair is None:
                losses.append(ranks.shared_mean(ranks.nothing(model), 0))
                continue
            said, taught = (to_padded(seen.made) for seen in pair)
            total = attention_transfer(said.x, taught.x, said.valid)
            losses.append(ranks.shared_mean(total, said.valid.any(1).sum()))
        return {"loss": weight * torch.stack(losses).mean()}


class TaughtAttention(Objective):
    """Attention like a teacher's, and values as much alike as its own are (MiniLM v2, arXiv 2012.15828).

    `layers` names `Attention` parts of the student ("fusion.transformer.layers.1.attention"), each with the teacher's.
    Queries with keys give the attention maps, values with values their relation, both before any rotary position and
    without the layer's rule of who sees whom. Channels are cut anew into `heads`, which must divide those of both.
    The mean over tokens and layers.
    """

    by_subset = False

    def __init__(self, layers: Mapping[str, str], heads: int, *, teacher: int = 0):
        super().__init__()
        self.layers, self.heads, self.teacher = dict(layers), heads, teacher

    def prepare(self, model: Model) -> None:
        Trace.on(model).watch(model, self.layers)

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        weight, pairs = compared(model, encoded, batch, self.layers, self.teacher)
        losses = []
        for pair in pairs:
            if pair is None:
                losses.append(ranks.shared_mean(ranks.nothing(model), 0))
                continue
            (q, k, v), (taught_q, taught_k, taught_v) = _projected(pair[0]), _projected(pair[1])
            valid = to_padded(pair[0].given).valid
            maps = relations((q, k), (taught_q, taught_k), valid, self.heads)
            values = relations((v, v), (taught_v, taught_v), valid, self.heads)
            losses.append(ranks.shared_mean(maps + values, valid.sum()))
        return {"loss": weight * torch.stack(losses).mean()}


def _projected(seen: Seen) -> tuple[Float[Tensor, "B T _"], Float[Tensor, "B T _"], Float[Tensor, "B T _"]]:
    """Queries, keys and values of an attention layer, padded, with keys and values repeated for grouped queries."""
    layer = seen.layer
    if not isinstance(layer, Attention):
        raise TypeError(f"{type(layer).__name__} has no attention maps to compare: name parts that are Attention")
    with torch.set_grad_enabled(seen.given.x.requires_grad):
        joint = to_padded(seen.given.with_x(layer.qkv(seen.given.x))).x
    sizes = (layer.heads * layer.head_dim, layer.groups * layer.head_dim, layer.groups * layer.value_dim)
    q, k, v = joint.split(sizes, -1)
    times = layer.heads // layer.groups
    k, v = (x.unflatten(-1, (layer.groups, -1)).repeat_interleave(times, -2).flatten(-2) for x in (k, v))
    return q, k, v


def _part(name: str) -> str:
    """The encoder that a layer belongs to, or the fusion."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "encoders" else "fusion"


def _submodule(model: Model, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        some = [found for found, _ in model.named_modules() if ".layers." in found][:3]
        raise ValueError(f"the model has no layer {name!r}: {error}; there are such as {', '.join(some)}") from error
