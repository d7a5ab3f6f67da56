"""BLIP-2: a Q-Former, whose learned queries alone look at the picture, and a language model that reads them.

Retrieval (its first stage of training) mixes queries and text in one fusion. One pass is enough under each mask:

    Visibility()                                             a pair is judged: all see all
    Visibility(sees={"latent": ["latent"], "text": ["text"]})  cosines: queries and text do not see each other
    Visibility(causal=True)                                  a text is written: it sees the queries and what it has

Generation (its second) is a cascade: the queries take the place of the picture in front of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmformer.checkpoints.changes import Joined, Reshaped
from mmformer.checkpoints.families import bert, blip, crossing, opt, parts, salesforce, texts, towers, vit_timm
from mmformer.checkpoints.families.crossing import LAST, Bert
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.salesforce import Tower
from mmformer.checkpoints.families.towers import IMAGE_LAYER
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import ZERO, Described, Family, Rule, rename
from mmformer.tokens import LATENT

DEFAULTS: dict[str, Config] = {
    "vision": {
        "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14, "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    },
    "qformer": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 30522, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "cross_attention_frequency": 2,
    },
}  # fmt: skip
"""What a config.json leaves out that says nothing else."""

APART = {LATENT: [LATENT], "text": ["text"]}
QUERIES, MEAN = "query_tokens", parts.part("mmformer.pooling.MeanPool")
QFORMER, SCORES = "Qformer.bert.", "Qformer.cls.predictions."
LANGUAGE_MODEL = "language_model.model.decoder."
NO_DECODER = "makes sentences, which takes a language model that the file lacks"


def matches(source: Source) -> bool:
    """`Blip2ForImageTextRetrieval`, `Blip2ForConditionalGeneration` or `Blip2Model`."""
    known = source.has(QUERIES, "vision_model.embeddings.class_embedding")
    return known and source.config.get("model_type", "blip-2") == "blip-2"


def matches_lavis(source: Source) -> bool:
    """The Q-Former of LAVIS' first stage, with or without its encoder of pictures."""
    return source.has(QUERIES, f"{QFORMER}embeddings.word_embeddings.weight")


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that config.json describes: it writes where the file has a language model, and judges otherwise.

    Raises:
        ValueError: a language model that mmformer does not have here.
    """
    if not source.config:
        raise parts.lacks(source, "its config.json")
    tower = blip.vision(source, options, DEFAULTS["vision"])
    config = DEFAULTS["qformer"] | (source.config.get("qformer_config") or {})
    text = Bert(
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        act=config["hidden_act"],
        eps=config["layer_norm_eps"],
        vocab_size=config["vocab_size"],
        length=config["max_position_embeddings"],
        context_dim=tower.dim,
    )
    count, every = towers.shape_of(source, QUERIES)[1], config["cross_attention_frequency"]
    writes = any(name.startswith("language_model.") for name in source.tensors)
    language = _language(source) if writes else {}
    if writes:
        model = _generation(source, tower, text, count, every, language)
    else:
        model = _retrieval(source, tower, text, count, every, ("vision_projection", "text_projection"))
    length = language.get("max_position_embeddings", text.length)
    return Described(
        model=model,
        features=tower.pictures.features(crop=False) | texts.features(length, begin=True, end=not writes),
        tokenizer=texts.tokenizer(source),
        layout={
            "writes": writes,
            "count": count,
            "stored": texts.stored(source, "language_model.lm_head.weight"),
            **tower.pictures.layout(),
        },
    )


def describe_lavis(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that the tensors describe.

    A file without the encoder of pictures, which training left as it was, needs its sizes as `vision`, as
    transformers' config has them ({} for EVA's ViT-g): it stays new, to be loaded from elsewhere.
    """
    alone = not source.has(f"{salesforce.VISUAL}pos_embed")
    if alone:
        if "vision" not in options:
            raise parts.lacks(source, "vision")
        said = {"vision_config": dict(options["vision"])}
        tower = blip.vision(replace(source, config=said), options, DEFAULTS["vision"])
    else:
        wide = 16 if source.tensors.shape(f"{salesforce.VISUAL}pos_embed")[2] == 1408 else None  # EVA's ViT-g
        tower = salesforce.tower(source, options, towers.OPENAI, heads=wide)
    tower.encoder["stages"][0]["norm"] = parts.layer_norm(1e-5)  # `ln_vision`, whatever the encoder has inside
    text = crossing.sizes(source, QFORMER, options.get("text_heads"))
    layers = [f"{QFORMER}encoder.layer.{i}.crossattention.self.key.weight" for i in range(text.depth)]
    places = [i for i, name in enumerate(layers) if source.has(name)]
    every = places[1] - places[0] if len(places) > 1 else text.depth
    count = towers.shape_of(source, QUERIES)[1]
    model = _retrieval(source, tower, text, count, every, ("vision_proj", "text_proj"))
    if towers.outputs(source, f"{SCORES}transform.dense"):
        model["heads"]["vocabulary"] = text.vocabulary()
    return Described(
        model=model,
        features=tower.pictures.features(crop=False) | texts.features(text.length, begin=True, end=True),
        tokenizer=texts.tokenizer(source),
        layout={"count": count, "stored": bert.stored_scores(source, SCORES), **salesforce.layout(tower.pictures)},
        ignored=bert.unused_bias(source, SCORES),
        new=(f"{towers.IMAGE}.embedder.*", f"{towers.IMAGE}.stages.0.layers.*") if alone else (),
    )


def _language(source: Source) -> Config:
    """The config of the language model.

    Raises:
        ValueError: a kind that mmformer does not have here.
    """
    config = source.config.get("text_config") or {}
    if (kind := config.get("model_type")) != "opt":
        raise ValueError(
            f"{source.origin} has the language model {kind!r}: mmformer's BLIP-2 reads its queries by 'opt'"
        )
    return texts.settings(replace(source, config=config), {}, *opt.SIZES)


def _layers(text: Bert, every: int, apart: bool) -> list[Config]:
    """The pattern of the layers: one of `every` looks at the picture."""
    return [text.layer(crosses=i == 0, apart=apart) for i in range(every)]


def _retrieval(
    source: Source, tower: Tower, text: Bert, count: int, every: int, projections: tuple[str, str]
) -> Config:
    """Queries and text in one stream; what a pair is judged by is the mean over the queries."""
    stack = text.stack(text.depth, *_layers(text, every, apart=True))
    apart = texts.visibility(sees=APART)
    heads = {}
    for name, theirs in zip(("image", "text"), projections, strict=True):
        if width := towers.outputs(source, theirs):
            head = towers.unit_head(text.dim, width, bias=True)
            heads[name] = head if name == "text" else parts.part("mmformer.heads.SharedHead", part=head, count=count)
    if width := towers.outputs(source, "itm_head"):
        heads["match"] = texts.linear(text.dim, width)
    first = parts.part("mmformer.pooling.FirstPool", start=count)
    queries = parts.part("mmformer.pooling.FirstPool", count=count, joined=True)
    return parts.model(
        {"image": tower.encoder, "text": text.encoder()},
        heads,
        fusion=crossing.fusion(
            text.dim, [LATENT, "text"], ["image"], stack, MEAN | {"modalities": [LATENT]}, num_latents=count,
            sequential=True,
        ),
        views={
            "image": crossing.view("image", queries),
            "text": crossing.view("text", first, visibility=apart),
        },
    )  # fmt: skip


def _generation(source: Source, tower: Tower, text: Bert, count: int, every: int, language: Config) -> Config:
    """The queries look at the picture, and a language model reads them before the text."""
    dim = language["hidden_size"]
    stack = text.stack(text.depth, *_layers(text, every, apart=False))
    entrance = texts.sequence(
        parts.part("mmformer.fusion.Mapped", part=texts.linear(text.dim, dim)), parts.part("mmformer.fusion.InOrder")
    )
    tied = language.get("tie_word_embeddings", True)
    return parts.model(
        {"image": tower.encoder, "text": parts.encoder(opt.embedder(language), [])},
        {"vocabulary": texts.vocabulary(dim, language["vocab_size"], tied=tied, bias=False)},
        fusion=crossing.cascade(
            {"image": crossing.fusion(text.dim, [LATENT], ["image"], stack, MEAN, num_latents=count)},
            crossing.fusion(
                dim, ["image", "text"], [], opt.stack(source, language), LAST, sequential=True,
                entrances={"image": entrance},
            ),
        ),
    )  # fmt: skip


def rules(described: Described) -> list[Rule]:
    """The table of BLIP-2 in transformers."""
    layout = described.layout
    fusion = "fusion.earlier.image" if layout["writes"] else "fusion"
    text = [
        *crossing.embedding_rules("embeddings."),
        *rename("vision_projection", "heads.image.part.out"),
        *rename("text_projection", "heads.text.out"),
        *rename("itm_head", "heads.match"),
    ]
    language = [
        *rename("language_projection", "fusion.last.entrances.image.0.part"),
        *opt.decoder_rules(LANGUAGE_MODEL, "fusion.last.transformer"),
        *texts.if_stored(described, "language_model.lm_head.weight", "heads.vocabulary.out.weight"),
    ]
    return [
        *blip.vision_rules(described),
        *_query_rules(layout["count"], fusion),
        *rename("qformer.layernorm", f"{fusion}.transformer.entry_norm"),
        *_layer_rules("qformer.encoder.layer.{i}.", fusion, "attention", apart=not layout["writes"]),
        *(language if layout["writes"] else text),
    ]


def rules_lavis(described: Described) -> list[Rule]:
    """The table of LAVIS' Q-Former, and of EVA's encoder of pictures, whose keys have no bias."""
    theirs = f"{salesforce.VISUAL}blocks.{{i}}.attn."
    bias = Rule((f"{theirs}q_bias", ZERO, f"{theirs}v_bias"), (f"{IMAGE_LAYER}.attention.qkv.bias",), Joined())
    return [
        bias,
        *rename("ln_vision", f"{towers.IMAGE}.stages.0.norm"),
        *([] if described.new else vit_timm.rules(described, salesforce.VISUAL)),
        *_query_rules(described.layout["count"], "fusion"),
        *crossing.embedding_rules(f"{QFORMER}embeddings."),
        *bert.norm_rules(f"{QFORMER}embeddings.LayerNorm", "fusion.transformer.entry_norm"),
        *_layer_rules(f"{QFORMER}encoder.layer.{{i}}.", "fusion", "self", apart=True),
        *crossing.transform_rules(SCORES),
        *bert.score_rules(described, SCORES),
        *rename("vision_proj", "heads.image.part.out"),
        *rename("text_proj", "heads.text.out"),
        *rename("itm_head", "heads.match"),
    ]


def _query_rules(count: int, fusion: str) -> list[Rule]:
    return [Rule((QUERIES,), (f"{fusion}.latents",), Reshaped((1, count, -1), (count, -1)))]


def _layer_rules(theirs: str, fusion: str, inner: str, *, apart: bool) -> list[Rule]:
    """The table of the layers; `apart` where texts have a feed-forward map too."""
    ours = f"{fusion}.transformer.layers.{{i}}"
    kinds = (("_query", f".parts.{LATENT}"), ("", ".parts.others")) if apart else (("_query", ""),)
    return [
        *crossing.layer_rules(theirs, ours, inner),
        *(rule for kind, inside in kinds for rule in crossing.feedforward_rules(theirs, ours, kind, inside)),
    ]


FAMILIES = (
    Family(
        name="blip-2",
        library="transformers",
        matches=matches,
        describe=describe,
        rules=rules,
        ignored=bert.IGNORED,
        options=towers.PICTURE_OPTIONS,
    ),
    Family(
        name="blip-2",
        library="lavis",
        matches=matches_lavis,
        describe=describe_lavis,
        rules=rules_lavis,
        ignored={
            **salesforce.IGNORED,
            "temp": "the temperature of a loss over the best of several queries, which no objective here computes",
            "opt_proj.*": NO_DECODER,
        },
        options=(*salesforce.OPTIONS, "vision"),
    ),
)
