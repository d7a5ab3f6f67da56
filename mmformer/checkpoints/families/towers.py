"""What the descriptions of ViT, DeiT, CLIP and SigLIP share: pictures cut into patches, layers with the norm in front.

Encoders of pictures and of the texts that belong to them, as config and as table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmformer.checkpoints.changes import Chain, ConvolutionPatches, GridPositions, Joined, Reshaped
from mmformer.checkpoints.families import parts, texts
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.preprocessing import preprocessing
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Rule, rename

IMAGE, IMAGE_LAYER = "encoders.image", "encoders.image.stages.0.layers.{i}"
PICTURE_OPTIONS = ("image_size", "mean", "std")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation of the colours, on the scale 0 to 1, that models were trained with."""

Pair = tuple[int, int]

PROBE = Reshaped((1, 1, -1), (1, -1))
"""One learned vector that is stored with an axis for the batch: the query of SigLIP's pool."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How pictures are read: height and width in the file's own terms and as wanted, and those of a patch.

    `said` is the feature by the files beside the weights, where they say.
    """

    stored: Pair
    size: Pair
    patch: Pair
    channels: int
    mean: list[float]
    std: list[float]
    said: Config | None

    def features(self, crop: bool) -> Config:
        """The feature that reads such pictures, cut from the middle or squeezed."""
        if self.said is not None:
            return {"image": self.said}
        resize, (height, width) = "mmformer.datasets.resize", self.size
        steps = [parts.part(f"{resize}.Squash", height=height, width=width)]
        if crop:
            whole = parts.part(f"{resize}.Cover", height=height, width=width)
            if height == width:
                whole = parts.part(f"{resize}.ShortestSide", side=height)
            steps = [whole, parts.part(f"{resize}.CentreCrop", height=height, width=width)]
        if (height % self.patch[0] or width % self.patch[1]) and self.patch[0] == self.patch[1]:
            steps.append(parts.part(f"{resize}.WholePatches", patch=self.patch[0]))
        return {"image": parts.part("mmformer.datasets.features.Picture", steps=steps, channels=self.channels)}

    def layout(self) -> dict[str, Any]:
        """What the table must know: the patch, and the grid of the positions in the file."""
        return {"patch": self.patch, "grid": _grid(self.stored, self.patch)}


def read_pictures(
    source: Source,
    options: Mapping[str, Any],
    *,
    size: int | Sequence[int],
    patch: int | Sequence[int],
    channels: int,
    colours: tuple[Sequence[float], Sequence[float]],
) -> Pictures:
    """The pictures of a checkpoint; `options` go before the files beside it (see `preprocessing`), and those before
    `colours`.

    Raises:
        ValueError: a mean or standard deviation for another number of channels, or a file beside it that asks for
            what mmformer does not do.
    """
    beside = {name: path for name, path in source.files.items() if name in PROCESSORS}
    said = preprocessing(beside, source.config)
    mean, std = (said.image_statistics.mean, said.image_statistics.std) if said.image_statistics else colours
    found = [list(options.get(name, value)) for name, value in (("mean", mean), ("std", std))]
    for name, values in zip(("mean", "std"), found, strict=True):
        if len(values) != channels and len(set(values)) > 1:
            raise ValueError(f"{source.origin}: {len(values)} numbers for the {name} of {channels} channels: "
                             f"give options={{{name!r}: [...]}}")  # fmt: skip
    mean, std = (values if len(values) == channels else values[:1] for values in found)
    stored, patch = pair(size), pair(patch)
    wanted = pair(options.get("image_size", stored))
    image = said.image if wanted == stored else None
    return Pictures(stored=stored, size=wanted, patch=patch, channels=channels, mean=mean, std=std, said=image)


def embedder(dim: int, pictures: Pictures, *, bias: bool = True, tokens: int = 1, positions: bool = True) -> Config:
    """Patches with a position for each cell of the grid, behind `tokens` learned ones with `positions` of their own."""
    rows, columns = _grid(pictures.size, pictures.patch)
    stem = parts.part(
        "mmformer.encoders.LinearPatches",
        dim=dim,
        channels=pictures.channels,
        size=list(pictures.patch),
        bias=bias,
    )
    mean, std = ([255 * value for value in values] for values in (pictures.mean, pictures.std))
    kinds = parts.factory("mmformer.encoders.ClassTokens", count=tokens, positions=positions)
    return parts.part(
        "mmformer.encoders.PlaneEmbedder",
        dim=dim,
        stem=stem,
        normalize=parts.part("mmformer.encoders.Normalize", mean=mean, std=std),
        modality="image",
        axes=["row", "column"],
        position=parts.factory("mmformer.nn.GridTable", rows=rows, columns=columns),
        class_tokens=kinds if tokens else None,
    )


def embedder_rules(described: Described, patches: str, positions: str, *, own: int, batched: bool) -> list[Rule]:
    """The table of an embedder but for its class tokens, by the names of its convolution and its positions.

    The first `own` positions are those of class tokens; `batched` positions have a first axis of 1.
    """
    patch, ours = described.layout["patch"], f"{IMAGE}.embedder"
    places = (f"{ours}.class_tokens.positions",) if own else ()
    grid = GridPositions(num_class=own, grid=described.layout["grid"], batched=batched)
    return [
        Rule((f"{patches}.weight",), (f"{ours}.stem.linear.weight",), ConvolutionPatches(patch)),
        Rule((f"{patches}.bias",), (f"{ours}.stem.linear.bias",)),
        Rule((positions,), (*places, f"{ours}.position.table"), grid),
    ]


def class_rule(*names: str) -> Rule:
    """The table of class tokens that are stored as (1, 1, D) each."""
    count, target = len(names), f"{IMAGE}.embedder.class_tokens.tokens"
    return Rule(names, (target,), Chain((Joined((1,) * count), Reshaped((count, 1, -1), (count, -1)))))


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of a Transformer with the norm in front of each branch."""

    dim: int
    depth: int
    heads: int
    hidden: int
    act: str
    eps: float
    qkv_bias: bool = True
    scaled: bool = False

    @property
    def norm(self) -> Config:
        """The factory of its norms."""
        return parts.layer_norm(self.eps)

    def stack(self, **options: Any) -> Config:
        """The Transformer, with a norm behind; options as in `mmformer.nn.Transformer`."""
        attention = parts.attention(self.heads, bias=True if self.qkv_bias else [False, True])
        feedforward = parts.feedforward(self.dim, self.hidden, self.act)
        if self.scaled:
            scale = {"initial": 1e-6}
            attention = parts.factory("mmformer.nn.Scaled", part=attention, **scale)
            feedforward = parts.factory("mmformer.nn.Scaled", part=feedforward, **scale)
        layer = parts.block(attention=attention, feedforward=feedforward, norm=self.norm)
        return parts.transformer(self.dim, self.depth, [layer], norm=self.norm, **options)

    def attention_pool(self) -> Config:
        """SigLIP's pool: a learned query over all tokens, with a feed-forward map as in the layers."""
        return parts.part(
            "mmformer.nn.AttentionPool",
            dim=self.dim,
            attention=parts.cross_attention(self.heads),
            feedforward=parts.feedforward(self.dim, self.hidden, self.act),
            norm=self.norm,
        )


def layer_rules(
    ours: str, theirs: str, norm1: str, out: str, norm2: str, up: str, down: str, scaled: bool = False
) -> list[Rule]:
    """The table of a layer but for queries, keys and values, by the original's names."""
    inside = ".part" if scaled else ""
    attention, feedforward = f"{ours}.attention{inside}", f"{ours}.feedforward{inside}"
    return [
        *rename(theirs + norm1, f"{ours}.attention_norm"),
        *rename(theirs + out, f"{attention}.out"),
        *rename(theirs + norm2, f"{ours}.feedforward_norm"),
        *rename(theirs + up, f"{feedforward}.up"),
        *rename(theirs + down, f"{feedforward}.down"),
    ]


def text_encoder(layers: Layers, vocab_size: int, length: int, *, causal: bool) -> Config:
    """Words and places to tokens, pooled at the last of them: CLIP's end of text, SigLIP's last place of 64."""
    embedding = parts.part(
        "mmformer.encoders.TextEmbedder",
        dim=layers.dim,
        vocab_size=vocab_size,
        position=parts.factory("mmformer.nn.Learned", num_positions=length),
    )
    stack = layers.stack(visibility=texts.visibility(causal=causal))
    return parts.encoder(embedding, [stack], parts.part("mmformer.pooling.LastPool"))


def text_features(length: int, pad: bool = False) -> Config:
    """How texts become ids: CLIP's between a begin and an end, SigLIP's in front of an end and padded."""
    ends = {"end": True, "pad": True} if pad else {"begin": True, "end": True}
    return {"text": parts.factory("mmformer.datasets.features.Text", max_length=length, **ends)}


def unit_head(dim: int, outputs: int | None, bias: bool = False) -> Config:
    """A head that embeds for comparison by cosine; without `outputs` it only normalises."""
    return parts.part("mmformer.heads.UnitHead", dim=dim, num_outputs=outputs, bias=bias)


def contrastive(loss: str, scale: float, bias: float | None = None) -> dict[str, Config]:
    """The objective that pictures and texts were trained with; the file's own scale and bias replace these."""
    objective = parts.part(
        "mmformer.objectives.Contrastive",
        modalities=["image", "text"],
        loss=parts.factory(f"mmformer.objectives.{loss}"),
        scale=scale,
        bias=bias,
    )
    return {"contrastive": objective}


def shape_of(source: Source, name: str) -> tuple[int, ...]:
    """The shape of a tensor that says how large the model is.

    Raises:
        ValueError: the file lacks it.
    """
    if name not in source.tensors:
        raise ValueError(f"{source.origin} lacks {name}, without which the size of the model is unknown: "
                         "it is damaged, or of another family")  # fmt: skip
    return source.tensors.shape(name)


def outputs(source: Source, name: str) -> int | None:
    """How many outputs a linear map of the file has, by its weight or its bias; None where it has neither."""
    found = next((f"{name}.{kind}" for kind in ("weight", "bias") if source.has(f"{name}.{kind}")), None)
    return source.tensors.shape(found)[0] if found else None


def depth(source: Source, prefix: str) -> int:
    """How many layers the file has, whose names start with a prefix and their number."""
    return len({name.removeprefix(prefix).split(".")[0] for name in source.tensors if name.startswith(prefix)})


def pair(size: int | Sequence[int]) -> Pair:
    """Height and width of what may be a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _grid(size: Pair, patch: Pair) -> Pair:
    return size[0] // patch[0], size[1] // patch[1]
