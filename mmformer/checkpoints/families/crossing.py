"""What BLIP, BLIP-2 and ALBEF share: a BERT whose layers look at a picture, or at another text, between their branches.

As config and as table. Where the same layers read texts alone too, the encoder of the text only embeds, the layers are
those of the fusion, and a view reads a text alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmformer.checkpoints.changes import Rows
from mmformer.checkpoints.families import parts, texts, towers
from mmformer.checkpoints.families.bert import norm_rules
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Rule, join, rename
from mmformer.tokens import LATENT

IDENTITY = parts.part("torch.nn.Identity")
FIRST, LAST = parts.part("mmformer.pooling.FirstPool"), parts.part("mmformer.pooling.LastPool")


@dataclass(frozen=True, kw_only=True)
class Bert:
    """The sizes of a BERT; `context_dim` is how many channels it looks at, `types` how many kinds of text it knows."""

    dim: int
    depth: int
    heads: int
    hidden: int
    act: str
    eps: float
    vocab_size: int
    length: int
    context_dim: int
    types: int = 0

    @property
    def norm(self) -> Config:
        """The factory of its norms."""
        return parts.layer_norm(self.eps)

    def encoder(self, modality: str = "text", stages: Sequence[Config] = (), pool: Config | None = None) -> Config:
        """An encoder that looks up words and places; what stands behind is `stages`."""
        embedder = parts.part(
            "mmformer.encoders.TextEmbedder",
            dim=self.dim,
            vocab_size=self.vocab_size,
            position=parts.factory("mmformer.nn.Learned", num_positions=self.length),
            num_types=self.types,
            modality=modality,
        )
        return parts.encoder(embedder, list(stages), pool)

    def layer(self, *, crosses: bool, apart: bool = False) -> Config:
        """A layer; with `apart` learned queries have a feed-forward map of their own and alone look at the context."""
        norm: Config = self.norm
        feedforward = parts.feedforward(self.dim, self.hidden, self.act)
        if apart:
            own = {"modalities": [LATENT]}
            behind = parts.factory("mmformer.nn.ByModality", part=norm, **own)
            norm = {"attention": norm, "cross": norm, "feedforward": behind}
            feedforward = parts.factory("mmformer.nn.ByModality", part=feedforward, **own)
        return parts.block(
            attention=parts.attention(self.heads),
            cross=parts.cross_attention(self.heads, context_dim=self.context_dim) if crosses else None,
            feedforward=feedforward,
            norm=norm,
            post_norm=True,
            cross_for=[LATENT] if apart and crosses else None,
        )

    def stack(self, depth: int, *layers: Config, embeds: bool = True, causal: bool = False) -> Config:
        """A stack of layers; `embeds` says that it stands right behind the embeddings, and normalises them."""
        return parts.transformer(
            self.dim,
            depth,
            list(layers),
            visibility=texts.visibility(causal=causal),
            norm=None,
            entry_norm=self.norm if embeds else None,
        )

    def vocabulary(self, modality: str = "text", tied: bool = True) -> Config:
        """The scores of words: a dense layer, a non-linearity and a norm before the table of the embeddings."""
        norm = texts.built(self.norm, normalized_shape=self.dim)
        act = texts.built(parts.activation(self.act))
        transform = texts.sequence(texts.linear(self.dim, self.dim), act, norm)
        head = texts.vocabulary(self.dim, self.vocab_size, tied=tied, transform=transform)
        return head | {"tied": modality} if tied else head


def sizes(source: Source, start: str, heads: int | None) -> Bert:
    """The sizes of a BERT without a config, by its tensors; heads have 64 channels where nothing else is said."""
    words, dim = towers.shape_of(source, f"{start}embeddings.word_embeddings.weight")
    layers = f"{start}encoder.layer."
    depth = towers.depth(source, layers)
    types = f"{start}embeddings.token_type_embeddings.weight"
    return Bert(
        dim=dim,
        depth=depth,
        heads=heads or heads_of(source, dim, "text_heads"),
        hidden=towers.shape_of(source, f"{layers}0.intermediate.dense.weight")[0],
        act="gelu",
        eps=1e-12,
        vocab_size=words,
        length=towers.shape_of(source, f"{start}embeddings.position_embeddings.weight")[0],
        context_dim=context_dim(source, layers),
        types=source.tensors.shape(types)[0] if source.has(types) else 0,
    )


def context_dim(source: Source, layers: str) -> int:
    """How many channels cross-attention reads, by the last layer that has it.

    Raises:
        ValueError: no layer has it.
    """
    names = [f"{layers}{i}.crossattention.self.key.weight" for i in range(towers.depth(source, layers))]
    if not (found := texts.stored(source, *names)):
        raise ValueError(f"{source.origin} has no {layers}*.crossattention: it is no system of pictures and texts")
    return source.tensors.shape(found[-1])[1]


def heads_of(source: Source, dim: int, option: str) -> int:
    """How many heads of 64 channels there are, as in every published file without a config.

    Raises:
        ValueError: another width, whose heads an option must give.
    """
    if dim % 64:
        raise parts.lacks(source, option)
    return dim // 64


def fusion(
    dim: int, stream: Sequence[str], context: Sequence[str], stack: Config, pool: Config, **options: Any
) -> Config:
    """A fusion whose modalities enter as they are, but for those of `entrances=`."""
    entrances = {name: IDENTITY for name in (*stream, *context) if name != LATENT} | options.pop("entrances", {})
    return parts.part(
        "mmformer.fusion.Fusion",
        dim=dim,
        stream=list(stream),
        transformer=stack,
        pool=pool,
        context=list(context),
        entrances=entrances,
        **options,
    )


def view(modality: str, pool: Config, **options: Any) -> Config:
    """How the vector of a modality is read off the fusion; options as in `mmformer.fusion.View`."""
    return parts.part("mmformer.fusion.View", modalities=[modality], pool=pool, **options)


def cascade(earlier: Mapping[str, Config], last: Config) -> Config:
    """Fusions one after another."""
    return parts.part("mmformer.fusion.Cascade", earlier=dict(earlier), last=last)


def embedding_rules(start: str, modality: str = "text") -> list[Rule]:
    """The table of words, places and kinds of text; `start` ends in "embeddings."."""
    embedder = f"encoders.{modality}.embedder"
    return [
        Rule((f"{start}word_embeddings.weight",), (f"{embedder}.table.weight",), Rows()),
        Rule((f"{start}position_embeddings.weight",), (f"{embedder}.position.table.weight",), Rows()),
        Rule((f"{start}token_type_embeddings.weight",), (f"{embedder}.types",)),
    ]


def layer_rules(theirs: str, ours: str, inner: str = "self") -> list[Rule]:
    """The table of a layer but for its feed-forward map; `inner` is what maps queries, keys and values lie in."""
    attention, cross = f"{theirs}attention", f"{theirs}crossattention"
    return [
        *join([f"{attention}.{inner}.{name}" for name in ("query", "key", "value")], f"{ours}.attention.qkv"),
        *rename(f"{attention}.output.dense", f"{ours}.attention.out"),
        *norm_rules(f"{attention}.output.LayerNorm", f"{ours}.attention_norm"),
        *rename(f"{cross}.{inner}.query", f"{ours}.cross.query"),
        *join([f"{cross}.{inner}.{name}" for name in ("key", "value")], f"{ours}.cross.key_value"),
        *rename(f"{cross}.output.dense", f"{ours}.cross.out"),
        *norm_rules(f"{cross}.output.LayerNorm", f"{ours}.cross_norm"),
    ]


def feedforward_rules(theirs: str, ours: str, kind: str = "", inside: str = "") -> list[Rule]:
    """The table of a feed-forward map and its norm: that of `kind` ("_query"), which lies `inside` ours."""
    return [
        *rename(f"{theirs}intermediate{kind}.dense", f"{ours}.feedforward{inside}.up"),
        *rename(f"{theirs}output{kind}.dense", f"{ours}.feedforward{inside}.down"),
        *norm_rules(f"{theirs}output{kind}.LayerNorm", f"{ours}.feedforward_norm{inside}"),
    ]


def text_rules(start: str, stack: str, modality: str = "text") -> list[Rule]:
    """The table of a whole BERT whose layers are those of one stack."""
    theirs, ours = start + "encoder.layer.{i}.", stack + ".layers.{i}"
    return [
        *embedding_rules(f"{start}embeddings.", modality),
        *norm_rules(f"{start}embeddings.LayerNorm", f"{stack}.entry_norm"),
        *layer_rules(theirs, ours),
        *feedforward_rules(theirs, ours),
    ]


def transform_rules(head: str) -> list[Rule]:
    """The table of what stands before the scores of words; `head` ends in "cls.predictions."."""
    return [
        *rename(f"{head}transform.dense", "heads.vocabulary.transform.0"),
        *norm_rules(f"{head}transform.LayerNorm", "heads.vocabulary.transform.2"),
    ]
