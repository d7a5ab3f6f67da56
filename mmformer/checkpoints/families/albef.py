"""ALBEF in its own code and in LAVIS: a BERT cut in two, of which only the upper half looks at the picture.

The lower half is the encoder of the text, whose states the fusion goes on from. With a decoder (VQA) it is a cascade:
the answer looks at the question, which has looked at the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmformer.checkpoints.families import bert, blip, clip, crossing, parts, salesforce, texts, towers, vit_timm
from mmformer.checkpoints.families.crossing import FIRST, Bert
from mmformer.checkpoints.families.parts import Config
from mmformer.checkpoints.families.salesforce import Tower
from mmformer.checkpoints.families.texts import STACK
from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Rule, rename

STARTS = ("text_encoder.bert.", "text_encoder.")
"""What names of the encoder start with, in files of the pre-training and of tasks."""

DECODER = "text_decoder.bert."


def matches(source: Source) -> bool:
    """A file of ALBEF, by its names: layers of the text look at the picture, but not the first."""
    return source.has("visual_encoder.blocks.0.attn.qkv.weight") and bool(_crossing(source))


def _start(source: Source) -> str:
    return next((s for s in STARTS if source.has(f"{s}embeddings.word_embeddings.weight")), STARTS[1])


def _crossing(source: Source) -> list[int]:
    """The numbers of the layers that look at the picture, where the first is not among them."""
    layers = f"{_start(source)}encoder.layer."
    found = [
        i for i in range(towers.depth(source, layers)) if source.has(f"{layers}{i}.crossattention.self.key.weight")
    ]
    return found if 0 not in found else []


def describe(source: Source, options: Mapping[str, Any]) -> Described:
    """The model that the tensors describe.

    Raises:
        ValueError: a text of which no upper part alone looks at the picture.
    """
    tower, start, crossed = salesforce.tower(source, options, towers.OPENAI), _start(source), _crossing(source)
    text = crossing.sizes(source, start, options.get("text_heads"))
    if not crossed or crossed != list(range(crossed[0], text.depth)):
        raise ValueError(
            f"{source.origin}: layers {crossed} of {text.depth} look at the picture, which are not the last"
        )
    answers = any(name.startswith(DECODER) for name in source.tensors)
    scores = "text_decoder.cls.predictions." if answers else "text_encoder.cls.predictions."
    model = _model(source, options, tower, text, crossed[0], answers)
    if towers.outputs(source, f"{scores}transform.dense"):
        writer = crossing.sizes(source, DECODER, options.get("text_heads")) if answers else text
        model["heads"]["vocabulary"] = writer.vocabulary("answer" if answers else "text")
    feature = texts.features(text.length, begin=True, end=True)["text"]
    return Described(
        model=model,
        objectives={} if answers else salesforce.contrastive(source),
        features=tower.pictures.features(crop=False) | {name: feature for name in model["encoders"] if name != "image"},
        tokenizer=texts.tokenizer(source),
        layout={
            "start": start,
            "below": crossed[0],
            "depth": text.depth,
            "answers": answers,
            "scores": scores,
            "stored": bert.stored_scores(source, scores),
            **salesforce.layout(tower.pictures),
        },
        ignored=bert.unused_bias(source, scores),
    )


def _model(source: Source, options: Mapping[str, Any], tower: Tower, text: Bert, below: int, answers: bool) -> Config:
    """The model but for its scores of words."""
    lower = text.stack(below, text.layer(crosses=False))
    upper = text.stack(text.depth - below, text.layer(crosses=True), embeds=False)
    encoders = {"image": tower.encoder, "text": text.encoder("text", [lower], FIRST)}
    fusion = crossing.fusion(text.dim, ["text"], ["image"], upper, FIRST)
    heads = {
        name: towers.unit_head(dim, width, bias=True)
        for name, dim, theirs in (("image", tower.dim, "vision_proj"), ("text", text.dim, "text_proj"))
        if (width := towers.outputs(source, theirs))
    }
    if width := towers.outputs(source, "itm_head"):
        heads["match"] = texts.linear(text.dim, width)
    if answers:
        answer = crossing.sizes(source, DECODER, options.get("text_heads"))
        encoders["answer"] = answer.encoder("answer")
        fusion = crossing.cascade({"text": fusion}, blip.decoder(answer, "answer", "text"))
    return parts.model(encoders, heads, fusion=fusion)


def rules(described: Described) -> list[Rule]:
    """The table of ALBEF."""
    layout = described.layout
    start, below, scores = layout["start"], layout["below"], layout["scores"]
    fusion = "fusion.earlier.text" if layout["answers"] else "fusion"
    found = [
        *vit_timm.rules(described, salesforce.VISUAL),
        *crossing.embedding_rules(f"{start}embeddings."),
        *bert.norm_rules(f"{start}embeddings.LayerNorm", f"{STACK}.entry_norm"),
    ]
    for i in range(layout["depth"]):
        theirs = f"{start}encoder.layer.{i}."
        ours = f"{STACK}.layers.{i}" if i < below else f"{fusion}.transformer.layers.{i - below}"
        found += [*crossing.layer_rules(theirs, ours), *crossing.feedforward_rules(theirs, ours)]
    if layout["answers"]:
        found += crossing.text_rules(DECODER, "fusion.last.transformer", "answer")
    return [
        *found,
        *crossing.transform_rules(scores),
        *bert.score_rules(described, scores),
        *rename("vision_proj", "heads.image.out"),
        *rename("text_proj", "heads.text.out"),
        *rename("itm_head", "heads.match"),
        salesforce.TEMPERATURE,
    ]


FAMILIES = (
    Family(
        name="albef",
        library="salesforce",
        matches=matches,
        describe=describe,
        rules=rules,
        ignored=salesforce.IGNORED,
        zeros=(clip.BIAS,),
        options=salesforce.OPTIONS,
    ),
)
