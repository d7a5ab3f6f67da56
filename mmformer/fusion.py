"""Tokens of all modalities to one sequence: every published fusion is a choice of stream, context and latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.nn.media import in_time
from mmformer.nn.memory import Memory, by_token
from mmformer.nn.sequences import in_order, nothing
from mmformer.nn.transformer import Transformer
from mmformer.tokens import LATENT, Tokens, latent_tokens, merge
from mmformer.visibility import Visibility


class Mark(nn.Module):
    """Add a learned vector that says which modality a token is of."""

    by_token = True

    def __init__(self, dim: int):
        super().__init__()
        self.kind = nn.Parameter(torch.randn(dim) * 0.02)

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(tokens.x + self.kind)


class Mapped(nn.Module):
    """The vectors of tokens through a map that knows nothing of tokens: a linear layer, a norm."""

    by_token = True

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens.with_x(self.part(tokens.x))


class InOrder(nn.Module):
    """Times 0, 1, 2, ... for the tokens of each segment: a picture that a language model reads token by token."""

    def forward(self, tokens: Tokens) -> Tokens:
        return in_order(tokens)


class Fusion(nn.Module):
    """Join the modalities of each sample into one sequence and let a Transformer mix it.

    `stream` names, in order, what is mixed and comes out; "latent" stands for `num_latents` learned tokens that every
    sample has, so that a sample lacking every other modality still has a row. `context` names what is only looked at,
    by layers with cross-attention. `sequential` counts time through the stream, as causal attention needs; the context
    then knows from when until when it is what a text saw last (`Visibility.current`, Flamingo).

        concatenation  stream [latent, image, audio, text]
        cross          stream [latent, text], context [image, audio]                      (ALBEF, BLIP)
        latents        stream [latent], context [image, audio, text]                      (Perceiver, Q-Former)
        bottleneck     stream [latent, ...], transformer's sees {image: [image, latent], ..} (MBT, arXiv 2107.00135)
        late           any stream, no transformer, and a pool that mixes

    `pool` makes the one vector a sample that heads read. `entrances` map a modality's tokens before they join (to
    `dim` channels, unless they are context of another width); one that is not named gets a `Mark`.

    Raises:
        ValueError: latents named without a number or the other way round.
    """

    def __init__(
        self,
        dim: int,
        stream: Sequence[str],
        transformer: nn.Module | None,
        pool: nn.Module,
        *,
        context: Sequence[str] = (),
        num_latents: int = 0,
        entrances: Mapping[str, nn.Module] | None = None,
        sequential: bool = False,
    ):
        super().__init__()
        if (LATENT in stream) != (num_latents > 0):
            raise ValueError(
                f"stream {list(stream)} with {num_latents} latents: name {LATENT!r} and give a number above 0"
            )
        self.dim, self.sequential = dim, sequential
        self.stream, self.context = list(stream), list(context)
        self.latents = nn.Parameter(torch.randn(num_latents, dim) * 0.02) if num_latents else None
        given = entrances or {}
        self.entrances = nn.ModuleDict(
            {name: given.get(name) or Mark(dim) for name in [*self.stream, *self.context] if name != LATENT}
        )
        self.transformer, self.pool = transformer, pool

    def forward(
        self,
        encoded: dict[str, Tokens],
        num_samples: int,
        visibility: Visibility | None = None,
        memory: Memory | None = None,
    ) -> Tokens:
        """The mixed stream; samples without any token of it have no segment.

        `visibility` adds to the Transformer's own rule: which of the Q-Former's masks, for one. With a `memory`, more
        of the modality that it `grows` can follow by `extend`.
        """
        if memory is not None:
            self._check_grows(memory.grows, encoded)
        packed = all(t.layout is not None for t in encoded.values())
        streams = [
            self._latents(num_samples, packed) if name == LATENT else self.entrances[name](encoded[name])
            for name in self.stream
            if name == LATENT or name in encoded
        ]
        if not streams:
            raise ValueError(
                f"the batch has {sorted(encoded) or 'no modality'} but the stream is {self.stream}: "
                f"put {LATENT!r} into the stream so that every sample has a token"
            )
        tokens = merge(streams, sequential=self.sequential)
        if self.transformer is None:
            return tokens
        context = self._context(encoded, streams, tokens)
        if memory is None:
            return self.transformer(tokens, context, visibility)
        return self.transformer(tokens, context, visibility, memory)

    def extend(self, name: str, tokens: Tokens, memory: Memory, visibility: Visibility | None = None) -> Tokens:
        """Further tokens of the modality `name`, padded, mixed with all of the stream and context before them.

        `visibility` is that of the first pass.
        """
        tokens = self.entrances[name](tokens)
        tokens = replace(tokens, segment=tokens.segment.clamp(max=0))  # a sample is one segment here
        if self.transformer is None:
            return tokens
        if self.sequential:
            time = tokens.position[..., :1]
            start = memory.of(self.transformer).next_time()[:, None, None]
            tokens = replace(tokens, position=torch.cat([time - time[:, :1] + start, tokens.position[..., 1:]], -1))
        return self.transformer(tokens, None, visibility, memory)

    def _check_grows(self, name: str, encoded: Mapping[str, Tokens]) -> None:
        """Stop if more tokens of a modality would not come last, or if something keeps no memory of them.

        Raises:
            ValueError: another modality stands behind it in the stream, or it is context.
            TypeError: its entrance or the Transformer does not take tokens one at a time.
        """
        layout = encoded[name].layout if name in encoded else None
        ordered = layout is not None and layout.places
        if name not in self.stream or (self.stream[-1] != name and not ordered):
            raise ValueError(f"the stream is {self.stream}: {name!r} can be continued where it is the last of it")
        if not by_token(self.entrances[name]):
            raise TypeError(f"the entrance of {name!r} does not take its tokens one at a time: use one that does")
        if self.transformer is not None and not isinstance(self.transformer, Transformer):
            raise TypeError(f"{type(self.transformer).__name__} keeps no memory: let a Transformer mix the stream")

    def _latents(self, num_samples: int, packed: bool) -> Tokens:
        assert self.latents is not None
        return latent_tokens(self.latents, num_samples, packed)

    def _context(self, encoded: dict[str, Tokens], streams: Sequence[Tokens], tokens: Tokens) -> Tokens | None:
        """The context in the order of the stream's samples, so that kernels can walk both together."""
        if not self.context:
            return None
        found = [self.entrances[name](encoded[name]) for name in self.context if name in encoded]
        if not found:
            return nothing(tokens)
        if self.sequential:
            found = in_time(found, streams)
        if tokens.layout is None:
            return merge(found)
        first = tokens.layout.samples
        rest = sorted(set(range(tokens.num_samples)) - set(first))
        return merge(found, order=[*first, *rest])

    def summary(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        """One vector a sample."""
        return self.pool(tokens)


class Cascade(nn.Module):
    """Fusions one after another, of which each of `earlier` gives the tokens of a modality to those behind it.

    BLIP's answers look at questions that have looked at the picture: earlier {text: stream [text], context [image]},
    last stream [answer], context [text]. BLIP-2's language model reads its Q-Former: earlier {image: stream [latent],
    context [image]}, last stream [image, text]. What is made may also have a name that no encoder has. One whose inputs
    a batch lacks is left out; `visibility` is the last's.

    Raises:
        ValueError: an earlier one under the name of a modality that none behind it reads.
    """

    def __init__(self, earlier: Mapping[str, Fusion], last: Fusion):
        super().__init__()
        self.earlier, self.last = nn.ModuleDict(earlier), last
        read = set(last.entrances).union(*(fusion.entrances for fusion in earlier.values()))
        if unread := sorted(set(earlier) - read):
            raise ValueError(f"the cascade makes {unread} but its fusions read {sorted(read)}: name one of these")
        self.stream = last.stream
        self.entrances = self._given()

    def _given(self) -> set[str]:
        """The modalities that encoders must give: what is read before any fusion has made it."""
        made: set[str] = set()
        given: set[str] = set()
        for name, fusion in [*self.earlier.items(), ("", self.last)]:
            given |= set(fusion.entrances) - made
            made.add(name)
        return given

    def forward(
        self,
        encoded: dict[str, Tokens],
        num_samples: int,
        visibility: Visibility | None = None,
        memory: Memory | None = None,
    ) -> Tokens:
        """The stream of the last fusion; with a `memory`, more of the modality that it grows can follow."""
        found = dict(encoded)
        for name, fusion in self.earlier.items():
            assert isinstance(fusion, Fusion)
            if memory is not None and memory.grows in fusion.entrances:
                raise ValueError(
                    f"the fusion that makes {name!r} reads {memory.grows!r}, which is to be continued: let it read "
                    "another modality, such as the question in front of an answer"
                )
            if not found.keys().isdisjoint(fusion.entrances.keys()):
                found[name] = fusion(found, num_samples)
        return self.last(found, num_samples, visibility, memory)

    def extend(self, name: str, tokens: Tokens, memory: Memory, visibility: Visibility | None = None) -> Tokens:
        """Further tokens of the modality `name`, padded; all that the earlier fusions read came before."""
        return self.last.extend(name, tokens, memory, visibility)

    def summary(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        """One vector a sample."""
        return self.last.summary(tokens)


class Exchange(nn.Module):
    """Modalities that stay sequences of their own and look at each other on the way: MBT, MulT.

    `mixer` is called with the names of the stream and makes the part that turns {modality: Tokens} into the same,
    mixed; then all are joined by sample, and `pool` reads them. `entrances` map a modality's tokens in front of it.
    """

    def __init__(
        self,
        stream: Sequence[str],
        mixer: Callable[[Sequence[str]], nn.Module],
        pool: nn.Module,
        *,
        entrances: Mapping[str, nn.Module] | None = None,
    ):
        super().__init__()
        self.stream = list(stream)
        given = entrances or {}
        self.entrances = nn.ModuleDict({name: given.get(name) or nn.Identity() for name in self.stream})
        self.mixer, self.pool = mixer(self.stream), pool

    def forward(
        self,
        encoded: dict[str, Tokens],
        num_samples: int,
        visibility: Visibility | None = None,
        memory: Memory | None = None,
    ) -> Tokens:
        """All modalities' tokens; samples without any have no segment.

        Raises:
            TypeError: a memory, which would have to keep what each layer exchanged.
            ValueError: the batch has no modality of the stream.
        """
        if memory is not None:
            self.extend()
        streams = {name: self.entrances[name](encoded[name]) for name in self.stream if name in encoded}
        if not streams:
            raise ValueError(f"the batch has {sorted(encoded) or 'no modality'} but the stream is {self.stream}")
        return merge(list(self.mixer(streams, num_samples, visibility).values()))

    def extend(self, *_) -> NoReturn:
        """Refuse to go on from a memory."""
        raise TypeError(f"{type(self.mixer).__name__} keeps no memory: let a Fusion mix what is to be continued")

    def summary(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        """One vector a sample."""
        return self.pool(tokens)


class View(nn.Module):
    """How one vector of a modality is read off the fusion, where its encoder only embeds: BLIP's texts.

    The fusion is given `modalities` alone, under `visibility` on top of its own rule, and `pool` reads what comes out.
    """

    def __init__(self, modalities: Sequence[str], pool: nn.Module, visibility: Visibility | None = None):
        super().__init__()
        self.modalities, self.pool, self.visibility = list(modalities), pool, visibility
