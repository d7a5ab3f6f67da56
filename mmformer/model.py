"""Encoders, a fusion and heads: the one model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn, zeros

from mmformer.batch import Batch
from mmformer.fusion import Cascade, Exchange, Fusion, View
from mmformer.heads import VocabularyHead
from mmformer.pooling import MeanPool, has_tokens
from mmformer.tokens import Tokens
from mmformer.visibility import Visibility


class Encoded(dict[str, Tokens]):
    """Tokens by modality, of a batch of `num_samples`; keeps what was fused of it, for objectives that share it.

    `shared` holds, by its type, what one objective has computed of this batch for those behind it.
    """

    def __init__(self, tokens: Mapping[str, Tokens], num_samples: int):
        super().__init__(tokens)
        self.num_samples = num_samples
        self.fused: dict[Visibility | None, Tokens] = {}
        self.shared: dict[type, Any] = {}

    def only(self, modalities: Iterable[str]) -> Encoded:
        """The same samples without the other modalities."""
        return Encoded({name: self[name] for name in modalities if name in self}, self.num_samples)


class Model(nn.Module):
    """One encoder for each modality, a fusion that joins them, and named heads that read one vector a sample.

    The vector of a modality is what its encoder's pool gives, or its own of `views` where it has one. `shared` makes
    parts one, by their names: {encoders.audio.stages.0: encoders.image.stages.0} lets sounds go through the layers of
    pictures, and the parameters count once.

    Raises:
        ValueError: the fusion names a modality that has no encoder, views without a fusion, or shared parts that are
            not there or not alike.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        fusion: Fusion | Cascade | Exchange | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        views: Mapping[str, View] | None = None,
        shared: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.fusion = fusion
        self.views = nn.ModuleDict(views or {})
        if views and fusion is None:
            raise ValueError(f"views of {sorted(views)} read a fusion, and there is none: choose one or drop them")
        self.heads = nn.ModuleDict(heads or {})
        self._share(shared or {})
        self._tie()
        if fusion is not None and not set(fusion.entrances) <= set(encoders):
            missing = sorted(set(fusion.entrances) - set(encoders))
            raise ValueError(f"the fusion reads {missing} but the encoders are {sorted(encoders)}: add or drop them")

    def _share(self, shared: Mapping[str, str]) -> None:
        """Put parts in the place of others, which must have parameters of the same names and shapes."""
        for name, other in shared.items():
            shapes = []
            for path in (name, other):
                try:
                    part = self.get_submodule(path)
                except AttributeError as error:
                    raise ValueError(f"shared names {path!r}, and this model has no such part: {error}") from error
                shapes.append({key: tuple(p.shape) for key, p in part.named_parameters()})
            if shapes[0] != shapes[1]:
                key = next(key for key in {**shapes[0], **shapes[1]} if shapes[0].get(key) != shapes[1].get(key))
                sizes = " and ".join(str(found.get(key, "nothing")) for found in shapes)
                raise ValueError(f"shared: {name} and {other} differ ({key} is {sizes}): make them of the same parts")
            self.set_submodule(name, self.get_submodule(other))

    def _tie(self) -> None:
        """Let heads over a vocabulary share the table of the embedder they name."""
        for name, head in self.heads.items():
            if not isinstance(head, VocabularyHead) or head.tied is None:
                continue
            if head.tied not in self.encoders:
                raise ValueError(
                    f"head {name!r} is tied to the table of encoder {head.tied!r}, the encoders are "
                    f"{sorted(self.encoders)}: name one of them, or none (tied: null)"
                )
            table = self.encoders.get_submodule(f"{head.tied}.embedder.table")
            assert isinstance(table, nn.Embedding)
            if head.out.weight.shape != table.weight.shape:
                raise ValueError(
                    f"head {name!r} scores {tuple(head.out.weight.shape)} and is tied to a table of "
                    f"{tuple(table.weight.shape)}: give it the table's width, behind a transform to it"
                )
            head.out.weight = table.weight

    def encode(self, batch: Batch) -> Encoded:
        """Tokens of each modality that the batch and the model have."""
        found = {
            name: encoder(batch.inputs[name], len(batch))
            for name, encoder in self.encoders.items()
            if name in batch.inputs
        }
        return Encoded(found, len(batch))

    def fuse(self, encoded: Encoded, visibility: Visibility | None = None) -> Tokens:
        """The fused sequence, made once for one `Encoded` and rule; `visibility` adds to the fusion's own rule.

        Raises:
            ValueError: a model without a fusion.
        """
        if self.fusion is None:
            raise ValueError("this model has no fusion: choose one, or let the objective read single modalities")
        if visibility not in encoded.fused:
            encoded.fused[visibility] = self.fusion(encoded, encoded.num_samples, visibility)
        return encoded.fused[visibility]

    def summary(self, encoded: Encoded, source: str | None = None) -> tuple[Float[Tensor, "N D"], Bool[Tensor, " N"]]:
        """One vector a sample, of the fused sequence or of one modality, and which samples have it."""
        if source is None:
            tokens = self.fuse(encoded)
            assert self.fusion is not None
            pooled = self.fusion.summary(tokens)
            return pooled, torch.ones_like(pooled[:, 0], dtype=torch.bool)
        if source in self.views:
            view = self.views[source]
            assert isinstance(view, View)
            if given := encoded.only(view.modalities):
                present = torch.stack([has_tokens(tokens) for tokens in given.values()]).any(0)
                return view.pool(self.fuse(given, view.visibility)), present
        if source in encoded:
            tokens = encoded[source]
            pool = getattr(self.encoders[source], "pool", None) or MeanPool()
            return pool(tokens), has_tokens(tokens)
        parameter = next(self.parameters())
        dim = next(iter(encoded.values())).x.shape[-1] if encoded else parameter.shape[-1]
        return parameter.new_zeros(encoded.num_samples, dim), zeros(
            encoded.num_samples, dtype=parameter.dtype, device=parameter.device
        ).bool()

    def output(
        self, encoded: Encoded, head: str, source: str | None = None
    ) -> tuple[Float[Tensor, "N O"], Bool[Tensor, " N"]]:
        """What a head says of each sample, and for which samples it had something to read.

        Raises:
            KeyError: no head of that name.
        """
        if head not in self.heads:
            raise KeyError(f"no head {head!r}: this model has {sorted(self.heads)}")
        vector, present = self.summary(encoded, source)
        return self.heads[head](vector), present

    def freeze(self, patterns: Iterable[str]) -> list[str]:
        """Stop training the parameters whose names match a pattern ("encoders.image.*"); gives back their names.

        Raises:
            ValueError: a pattern that matches nothing.
        """
        frozen = []
        for pattern in patterns:
            hits = [name for name, _ in self.named_parameters() if fnmatchcase(name, pattern)]
            if not hits:
                raise ValueError(f"freeze pattern {pattern!r} matches no parameter; one of them is called "
                                 f"{next(iter(self.state_dict()))!r}")  # fmt: skip
            frozen += hits
        chosen = set(frozen)
        for name, parameter in self.named_parameters():
            if name in chosen:
                parameter.requires_grad_(False)
        return sorted(chosen)
