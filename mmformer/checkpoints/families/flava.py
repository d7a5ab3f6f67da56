"""FLAVA as transformers saves it: a tower of pictures, one of texts, and a third Transformer over the tokens of both.

Both towers have their norms in front, although that of texts embeds as BERT does. The third one reads what stands in
front of their last norms, so those are part of the pools, and of the heads that read words or patches of one tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmformer.checkpoints.changes import Copied, Reshaped, Rows
from mmformer.checkpoints.families import bert, crossing, parts, texts, towers
from mmformer.checkpoints.families.clip import BIAS, INITIAL_SCALE, SCALE
from mmformer.checkpoints.families.crossing import FIRST
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.texts import STACK, TEXT
from mmformer.checkpoints.families.towers import IMAGE, IMAGE_LAYER, Layers
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, join, rename
from mmformer.tokens import LATENT

SHARED: Config = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True,
}  # fmt: skip
DEFAULTS: dict[str, Config] = {
    "image": SHARED | {"image_size": 224, "patch_size": 16, "num_channels": 3},
    "text": SHARED | {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2},
    "multimodal": SHARED | {"num_hidden_layers": 6, "use_cls_token": True},
}
"""What the config of a tower leaves out that says nothing else."""

MASKED = {"mim": "image", "mlm": "text", "mmm_image": "image", "mmm_text": "text"}
"""Heads for hidden patches and words: the tower whose vocabulary each has; those of both read fused tokens."""

POOLERS = {"image": "image_pooler", "text": "text_pooler", "multimodal": "pooler"}
"""The heads behind the first token of a tower."""

MASK_TOKEN = "image_model.embeddings.mask_token"
"""What stands for hidden patches."""

IGNORED = {
    **bert.IGNORED,
    "image_codebook.*": "makes the targets of hidden patches, which come with the data here",
    "*logit_scale": "the temperature of an objective, and none is loaded here",
}


def matches(source: Source) -> bool:
    """`FlavaModel`, or `FlavaForPreTraining` around it."""
    if source.config:
        return source.config.get("model_type") == "flava"
    return source.has(f"{texts.prefix(source, 'flava.')}multimodal_model.layernorm.weight")


@dataclass(frozen=True)
class _Tower:
    """One of the three Transformers: its config, and the layers that it describes."""

    config: Config

    @property
    def layers(self) -> Layers:
        return layers(self.config)

    @property
    def dim(self) -> int:
        return self.config["hidden_size"]

    @property
    def norm(self) -> Config:
        return texts.built(self.layers.norm, normalized_shape=self.dim)

    def encoder(self, embedder: Config, **options: Any) -> Config:
        """The embedder and the layers; the last norm belongs to the pool."""
        stack = self.layers.stack(**options) | {"norm": None}
        return parts.encoder(embedder, [stack], texts.sequence(FIRST, self.norm))

    def masked(self, size: int, *before: Config) -> Config:
        """A head for hidden words or patches."""
        act = texts.built(parts.activation(self.config["hidden_act"]))
        transform = texts.sequence(*before, texts.linear(self.dim, self.dim), act, self.norm)
        return texts.vocabulary(self.dim, size, tied=False, transform=transform)


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that config.json describes, with those heads of pre-training that the file has and that fit it."""
    if not source.config:
        raise parts.lacks(source, "its config.json")
    image, text, both = (_Tower(_config(source, name)) for name in DEFAULTS)
    pictures = towers.read_pictures(
        source,
        options,
        size=image.config["image_size"],
        patch=image.config["patch_size"],
        channels=image.config["num_channels"],
        colours=towers.OPENAI,
    )
    hides = source.has(f"{texts.prefix(source, 'flava.')}{MASK_TOKEN}")
    mask = {"mask": parts.factory("mmformer.encoders.MaskVector")} if hides else {}
    encoders = {
        "image": image.encoder(towers.embedder(image.dim, pictures) | mask),
        "text": text.encoder(words(text.config), entry_norm=text.layers.norm),
    }
    heads, ignored = _heads(source, image, text, both)
    length = text.config["max_position_embeddings"]
    return Described(
        model=parts.model(encoders, heads, fusion=_fusion(image, text, both)),
        objectives=towers.contrastive("info_nce", INITIAL_SCALE),
        features=pictures.features(crop=False) | texts.features(length, begin=True, end=True),
        tokenizer=texts.tokenizer(source),
        layout={
            "prefix": texts.prefix(source, "flava."),
            "masked": sorted(MASKED.keys() & heads.keys()),
            "biases": texts.stored(source, *(f"{name}_head.decoder.bias" for name in MASKED)),
            "hides": hides,
            **pictures.layout(),
        },
        ignored=ignored,
    )


def _config(source: Source, name: str) -> Config:
    """The config of a tower; where there is a `*_config_dict` too, as in files of 2022, that one's values count."""
    found = [source.config.get(f"{name}_config{end}") or {} for end in ("", "_dict")]
    return DEFAULTS[name] | found[0] | found[1]


def layers(config: Config) -> Layers:
    """The layers of a tower, or of ViLT."""
    return Layers(
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        act=config["hidden_act"],
        eps=config["layer_norm_eps"],
        qkv_bias=config["qkv_bias"],
    )


def words(config: Config) -> Config:
    """The embedder of texts, with words, places and kinds as BERT has them."""
    return parts.part(
        "mmformer.encoders.TextEmbedder",
        dim=config["hidden_size"],
        vocab_size=config["vocab_size"],
        position=parts.factory("mmformer.nn.Learned", num_positions=config["max_position_embeddings"]),
        num_types=config["type_vocab_size"],
    )


def _fusion(image: _Tower, text: _Tower, both: _Tower) -> Config:
    """The third Transformer, over a class token of its own, pictures and texts."""
    own = both.config["use_cls_token"]
    entrances = {
        name: parts.part("mmformer.fusion.Mapped", part=texts.linear(tower.dim, both.dim))
        for name, tower in (("image", image), ("text", text))
    }
    stream = [LATENT, "image", "text"] if own else ["image", "text"]
    return crossing.fusion(
        both.dim, stream, [], both.layers.stack(), FIRST, entrances=entrances, num_latents=int(own)
    )  # fmt: skip


def pooler(dim: int) -> tuple[Config, Config]:
    """What stands behind the first token."""
    return texts.linear(dim, dim), parts.part("torch.nn.Tanh")


def _heads(source: Source, image: _Tower, text: _Tower, both: _Tower) -> tuple[dict[str, Config], dict[str, str]]:
    """The heads that the file has, and what to leave out with the reason."""
    start = texts.prefix(source, "flava.")
    width = towers.outputs(source, f"{start}image_projection") or source.config.get("projection_dim", 768)
    heads, ignored = {}, {}
    for name, tower in (("image", image), ("text", text), ("multimodal", both)):
        if tower is not both:
            heads[name] = towers.unit_head(tower.dim, width, bias=True)
        if towers.outputs(source, f"{start}{name}_model.pooler.dense"):
            heads[POOLERS[name]] = texts.sequence(*pooler(tower.dim))
    wanted = {name: (image if modality == "image" else text) for name, modality in MASKED.items()}
    for name, tower in wanted.items():
        fused = name.startswith("mmm")
        if _fits(source, f"{name}_head.transform.dense", both if fused else tower, ignored):
            size = towers.outputs(source, f"{name}_head.decoder") or tower.config["vocab_size"]
            heads[name] = tower.masked(size, *([] if fused else [tower.norm]))
        if source.has(f"{name}_head.decoder.bias"):
            ignored.setdefault(f"{name}_head.bias", "decoder.bias is the one in use")
    if _fits(source, "itm_head.pooler.dense", both, ignored):
        heads["match"] = texts.sequence(*pooler(both.dim), texts.linear(both.dim, 2))
    return heads, ignored


def _fits(source: Source, name: str, tower: _Tower, ignored: dict[str, str]) -> bool:
    """Whether the file has a head that begins with this map, and the map reads the tokens of a tower.

    transformers makes the heads of fused tokens as wide as the tower whose vocabulary they have, or as a width of its
    own; where that is another one, they can read nothing, and are put down as `ignored`.
    """
    head, width = name.split(".")[0], towers.outputs(source, name)
    if not any(key.startswith(f"{head}.") for key in source.tensors):
        return False
    if width in (None, tower.dim):
        return True
    ignored[f"{head}.*"] = f"reads {width} channels, and the fused tokens have {tower.dim}: nothing can use it"
    return False


def rules(described: Described) -> list[Rule]:
    """The table of FLAVA in transformers."""
    start, masked = described.layout["prefix"], described.layout["masked"]
    image, text, both = (f"{start}{name}_model." for name in ("image", "text", "multimodal"))
    patches, positions = f"{image}embeddings.patch_embeddings.projection", f"{image}embeddings.position_embeddings"
    found = [
        towers.class_rule(f"{image}embeddings.cls_token"),
        *towers.embedder_rules(described, patches, positions, own=1, batched=True),
        *crossing.embedding_rules(f"{text}embeddings."),
        *rename(f"{text}embeddings.LayerNorm", f"{STACK}.entry_norm"),
        Rule((f"{both}cls_token",), ("fusion.latents",), Reshaped((1, 1, -1), (1, -1))),
        *layer_rules(f"{image}encoder.layer.{{i}}.", IMAGE_LAYER),
        *layer_rules(f"{text}encoder.layer.{{i}}.", f"{STACK}.layers.{{i}}"),
        *layer_rules(f"{both}encoder.layer.{{i}}.", "fusion.transformer.layers.{i}"),
        *_last_norm(f"{image}layernorm", f"{IMAGE}.pool.1", "mim" if "mim" in masked else None),
        *_last_norm(f"{text}layernorm", f"{TEXT}.pool.1", "mlm" if "mlm" in masked else None),
        *rename(f"{both}layernorm", "fusion.transformer.norm"),
        *rename(f"{both}pooler.dense", f"heads.{POOLERS['multimodal']}.0"),
        *rename("itm_head.pooler.dense", "heads.match.0"),
        *rename("itm_head.seq_relationship", "heads.match.2"),
        Rule((f"{start}logit_scale",), (SCALE,)),
    ]
    if described.layout["hides"]:
        found.append(Rule((start + MASK_TOKEN,), (f"{IMAGE}.embedder.mask.vector",), Reshaped((1, 1, -1), (-1,))))
    for name, theirs in (("image", image), ("text", text)):
        found += [
            *rename(f"{theirs}pooler.dense", f"heads.{POOLERS[name]}.0"),
            *rename(f"{start}{name}_to_mm_projection", f"fusion.entrances.{name}.part"),
            *rename(f"{start}{name}_projection", f"heads.{name}.out"),
        ]
    return [*found, *(rule for name in masked for rule in _masked_rules(described, name))]


def _last_norm(theirs: str, pool: str, head: str | None) -> list[Rule]:
    """The last norm of a tower, of which the head for its hidden words or patches has a copy."""
    if head is None:
        return rename(theirs, pool)
    copy = f"heads.{head}.transform.0"
    return [Rule((f"{theirs}.{kind}",), (f"{pool}.{kind}", f"{copy}.{kind}"), Copied()) for kind in ("weight", "bias")]


def _masked_rules(described: Described, name: str) -> list[Rule]:
    """The table of a head for hidden words or patches; before version 5 transformers saves its bias as `bias`."""
    theirs, ours, first = f"{name}_head", f"heads.{name}", 0 if name.startswith("mmm") else 1
    bias = "decoder.bias" if f"{theirs}.decoder.bias" in described.layout["biases"] else "bias"
    return [
        *rename(f"{theirs}.transform.dense", f"{ours}.transform.{first}"),
        *rename(f"{theirs}.transform.LayerNorm", f"{ours}.transform.{first + 2}"),
        Rule((f"{theirs}.decoder.weight",), (f"{ours}.out.weight",), Rows()),
        Rule((f"{theirs}.{bias}",), (f"{ours}.out.bias",), Rows()),
    ]


def layer_rules(theirs: str, ours: str) -> list[Rule]:
    """The table of a layer, which ViLT shares."""
    queries = [f"{theirs}attention.attention.{name}" for name in ("query", "key", "value")]
    names = ("layernorm_before", "attention.output.dense", "layernorm_after", "intermediate.dense", "output.dense")
    return [*join(queries, f"{ours}.attention.qkv"), *towers.layer_rules(ours, theirs, *names)]


FAMILIES = (
    Family(
        name="flava",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        options=towers.PICTURE_OPTIONS,
        ignored=IGNORED,
        zeros=(BIAS,),
    ),
)
