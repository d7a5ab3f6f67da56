from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from mmformer.checkpoints.families.blip2 import APART
from mmformer.checkpoints.load import load
from mmformer.checkpoints.plan import original
from mmformer.checkpoints.report import MisfitError
from mmformer.visibility import Visibility
from tests.checkpoints.families.fused import (
    VISION,
    WORDS,
    Pairs,
    into_its_class,
    loaded_from,
    moves,
    reasons,
    rows,
    texts,
    timm_names,
)
from tests.checkpoints.families.visions import epsilons, tensors
from tests.checkpoints.oracles import close, saved, scramble

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")

QUERIES, SHARED, PLACEHOLDER = 5, 14, 70
QFORMER = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": WORDS,
    "max_position_embeddings": 15, "cross_attention_frequency": 2,
}  # fmt: skip
OPT = {
    "model_type": "opt", "hidden_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 52,
    "vocab_size": 71, "max_position_embeddings": 23, "word_embed_proj_dim": 28,
}  # fmt: skip


def config(qformer=(), text=(), reads: bool = True, **options):
    return transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER | {"use_qformer_text_input": reads} | dict(qformer),
        text_config=OPT | dict(text),
        num_query_tokens=QUERIES,
        image_text_hidden_size=SHARED,
        **options,
    )


def split(model, tokens) -> tuple[Tensor, list[Tensor]]:
    """The queries (N, K, D) of a fused sequence, and the states of each text."""
    found = rows(tokens)
    return torch.stack([row[:QUERIES] for row in found]), [row[QUERIES:] for row in found]


def cosines(image: Tensor, text: Tensor) -> Tensor:
    """Of each picture (row) with each text, the best over the queries; from K vectors a picture, side by side."""
    return torch.einsum("nkd,md->nkm", image.unflatten(-1, (-1, SHARED)), text).amax(1)


def contrasted(reference, pairs) -> Tensor:
    """The reference's cosines; one text at a time, as it gives no mask to the texts it pads."""
    scores = [reference(pairs.pixels, text[None].expand(len(pairs.texts), -1)) for text in pairs.texts]
    return torch.stack([score.logits_per_image[:, 0] for score in scores], 1)


def test_retrieval_gives_judgements_and_cosines_of_the_reference(tmp_path):
    reference = transformers.Blip2ForImageTextRetrieval(config())
    loaded = loaded_from(reference, tmp_path)
    model, pairs = loaded.model, Pairs()
    with torch.inference_mode():
        encoded = model.encode(pairs.batch)
        theirs = reference(pairs.pixels, pairs.ids, pairs.mask, use_image_text_matching_head=True)
        close(model.output(encoded, "match")[0], theirs.logits_per_image)
        expected = contrasted(reference, pairs)
        close(cosines(*(model.output(encoded, name, name)[0] for name in ("image", "text"))), expected)
        # the uni-modal mask gives both sides in one pass
        queries, states = split(model, model.fuse(encoded, Visibility(sees=APART)))
        image = model.heads["image"](queries.flatten(1))
        close(cosines(image, model.heads["text"](torch.stack([row[0] for row in states]))), expected)
    encoded = model.encode(pairs.batch)
    moves(loaded, model.output(encoded, "match")[0], *(model.output(encoded, n, n)[0] for n in ("image", "text")))
    into_its_class(loaded, reference, tmp_path)


def masked(reference, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The reference's Q-Former under a mask of its own, (L, L) of what sees what."""
    image = reference.vision_model(pixels).last_hidden_state
    embedded = reference.embeddings(input_ids=ids, query_embeds=reference.query_tokens)
    return reference.qformer(
        embedded, query_length=QUERIES, attention_mask=mask[None, None], encoder_hidden_states=image
    ).last_hidden_state[0]


def causal(length: int) -> Tensor:
    """Queries see queries, a word sees all queries and the words up to itself."""
    mask = torch.ones(QUERIES + length, QUERIES + length).tril().bool()
    mask[:QUERIES, :QUERIES] = True
    return mask


def unimodal(length: int) -> Tensor:
    """Queries see queries, words see words."""
    mine = torch.arange(QUERIES + length) < QUERIES
    return mine[:, None] == mine


def everything(length: int) -> Tensor:
    return torch.ones(QUERIES + length, QUERIES + length).bool()


@pytest.mark.parametrize(
    ("rule", "mask"),
    [
        (None, everything),
        (Visibility(sees=APART), unimodal),
        (Visibility(causal=True), causal),
    ],
    ids=["bidirectional", "uni-modal", "multimodal-causal"],
)
def test_each_mask_is_one_pass(rule, mask, tmp_path):
    reference = transformers.Blip2ForImageTextRetrieval(config())
    loaded = loaded_from(reference, tmp_path)
    pairs = Pairs()
    with torch.inference_mode():
        ours = rows(loaded.model.fuse(loaded.model.encode(pairs.batch), rule))
        theirs = [masked(reference, pixels, ids, mask(ids.shape[1])) for pixels, ids in pairs]
        close(torch.cat(ours), torch.cat(theirs))


def test_only_queries_look_at_the_picture_in_every_second_layer_through_maps_of_their_own(tmp_path):
    loaded = loaded_from(transformers.Blip2ForImageTextRetrieval(config()), tmp_path)
    layers = loaded.model.fusion.transformer.layers
    assert [layer.cross is not None for layer in layers] == [True, False, True]
    pairs = Pairs()

    def apart():
        with torch.inference_mode():
            queries, states = split(
                loaded.model, loaded.model.fuse(loaded.model.encode(pairs.batch), Visibility(sees=APART))
            )
            return queries, torch.cat(states)

    queries, states = apart()
    for layer in layers:
        nn.init.zeros_(layer.feedforward.parts["others"].down.weight)
    again, changed = apart()
    assert torch.equal(queries, again)
    assert (states - changed).abs().max() > 0.1
    for layer in layers[::2]:
        nn.init.zeros_(layer.cross.out.weight)
    blind, same = apart()
    assert torch.equal(changed, same)
    assert (blind - again).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["Blip2ForConditionalGeneration", "Blip2Model"])
def test_the_language_model_reads_the_queries_before_the_text(kind, tmp_path):
    reference = getattr(transformers, kind)(config(reads=False, image_token_index=PLACEHOLDER))
    loaded = loaded_from(reference, tmp_path)
    model, pairs = loaded.model, Pairs(texts(words=PLACEHOLDER))
    behind = torch.full((1, QUERIES), PLACEHOLDER)
    with torch.inference_mode():
        theirs = [reference(pixels, torch.cat([behind, ids], 1)).logits[0] for pixels, ids in pairs]
        ours = [model.heads["vocabulary"](states) for states in rows(model.fuse(model.encode(pairs.batch)))]
        close(torch.cat(ours), torch.cat(theirs))
        alone = model.fuse(model.encode(pairs.batch).only(["text"]))
        words = [reference.language_model(ids).logits[0] for _, ids in pairs]
        close(torch.cat([model.heads["vocabulary"](states) for states in rows(alone)]), torch.cat(words))
    moves(loaded, model.heads["vocabulary"](model.fuse(model.encode(pairs.batch)).x))
    into_its_class(loaded, reference, tmp_path)


def test_opt_alone_gives_the_scores_of_the_reference(tmp_path):
    reference = transformers.OPTForCausalLM(transformers.OPTConfig(**OPT))
    loaded = load(saved(scramble(reference), tmp_path))
    assert loaded.report.ok
    pairs = Pairs(texts(words=PLACEHOLDER))
    with torch.inference_mode():
        theirs = [reference(ids).logits[0] for _, ids in pairs]
        ours = [loaded.model.heads["vocabulary"](x) for x in rows(loaded.model.encode(pairs.batch)["text"])]
        close(torch.cat(ours), torch.cat(theirs))
    assert epsilons(loaded.model) == {1e-5}
    into_its_class(loaded, reference, tmp_path)


def test_other_language_models_are_refused_by_name(tmp_path):
    reference = transformers.Blip2ForConditionalGeneration(config(reads=False, image_token_index=PLACEHOLDER))
    saved(reference, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said["text_config"]["model_type"] = "t5"
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="language model 't5'"):
        load(tmp_path)
    said["text_config"] |= {"model_type": "opt", "word_embed_proj_dim": 12}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="words of 12 channels and layers of 28"):
        load(tmp_path)


def lavis(reference, head) -> dict[str, Tensor]:
    """The tensors of a scrambled retrieval model, and of a head over the vocabulary, under LAVIS' names."""
    held = {}
    for name, tensor in reference.state_dict().items():
        if name.startswith("vision_model."):
            continue
        for theirs, ours in {
            "qformer.encoder": "Qformer.bert.encoder",
            "attention.attention.": "attention.self.",
            "qformer.layernorm": "Qformer.bert.embeddings.LayerNorm",
            "vision_projection": "vision_proj",
            "text_projection": "text_proj",
        }.items():
            name = name.replace(theirs, ours)
        held[f"Qformer.bert.{name}" if name.startswith("embeddings.") else name] = tensor
    for name, tensor in timm_names(reference.vision_model.state_dict()).items():
        if name.endswith("attn.qkv.bias"):
            query, key, value = tensor.chunk(3)
            assert not key.any()
            start = name.removesuffix("qkv.bias")
            held |= {f"{start}q_bias": query, f"{start}v_bias": value}
        else:
            held[name.replace("visual_encoder.norm.", "ln_vision.")] = tensor
    held |= {f"Qformer.cls.{name}": tensor for name, tensor in head.state_dict().items()}
    held["Qformer.cls.predictions.decoder.weight"] = held["Qformer.bert.embeddings.word_embeddings.weight"]
    held["Qformer.bert.embeddings.position_ids"] = torch.arange(15)[None]
    return held | {"temp": torch.tensor(0.07)}


@pytest.fixture
def first_stage():
    """A scrambled retrieval model as LAVIS computes it, a head for writing, and their tensors in LAVIS' layout."""
    from transformers.models.bert.modeling_bert import BertOnlyMLMHead

    reference = scramble(transformers.Blip2ForImageTextRetrieval(config()))
    reference.vision_model.post_layernorm.eps = 1e-5
    for layer in reference.vision_model.encoder.layers:
        nn.init.zeros_(layer.self_attn.qkv.bias.data[20:40])  # keys have no bias there
    sizes = {name: QFORMER[name] for name in ("hidden_size", "vocab_size", "num_attention_heads")}
    head = scramble(BertOnlyMLMHead(transformers.BertConfig(**sizes)), seed=5)
    head.predictions.decoder.weight = reference.embeddings.word_embeddings.weight
    head.predictions.bias = head.predictions.decoder.bias
    return reference, head, lavis(reference, head)


HEADS = {"num_heads": 2, "text_heads": 3}


def test_lavis_first_stage_judges_compares_and_writes_as_the_reference(first_stage, tmp_path):
    reference, head, held = first_stage
    torch.save({"model": held, "iters": 7}, tmp_path / "blip2_pretrained.pth")
    loaded = load(tmp_path / "blip2_pretrained.pth", options=HEADS)
    assert loaded.family.library == "lavis"
    assert loaded.report.ok, str(loaded.report)
    assert set(reasons(loaded)) == {
        "temp", "Qformer.bert.embeddings.position_ids", "Qformer.cls.predictions.bias",
    }  # fmt: skip
    model, pairs = loaded.model, Pairs()
    with torch.inference_mode():
        encoded = model.encode(pairs.batch)
        theirs = reference(pairs.pixels, pairs.ids, pairs.mask, use_image_text_matching_head=True)
        close(model.output(encoded, "match")[0], theirs.logits_per_image)
        ours = cosines(*(model.output(encoded, name, name)[0] for name in ("image", "text")))
        close(ours, contrasted(reference, pairs))
        _, states = split(model, model.fuse(encoded, Visibility(causal=True)))
        written = [head(masked(reference, pixels, ids, causal(ids.shape[1]))[QUERIES:]) for pixels, ids in pairs]
        close(torch.cat([model.heads["vocabulary"](x) for x in states]), torch.cat(written))
    encoded = model.encode(pairs.batch)
    moves(
        loaded,
        model.output(encoded, "match")[0],
        *(model.output(encoded, name, name)[0] for name in ("image", "text")),
        model.heads["vocabulary"](model.fuse(encoded, Visibility(causal=True)).x),
    )
    assert epsilons(model.encoders["image"].stages[0].norm) == {1e-5}
    made = original(tensors(loaded), loaded.family.rules(loaded.described))
    kept = {name: tensor for name, tensor in held.items() if name not in reasons(loaded)}
    assert made.keys() == kept.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in kept.items())


def test_a_bias_of_keys_that_was_trained_cannot_go_back(first_stage, tmp_path):
    torch.save({"model": first_stage[2]}, tmp_path / "blip2.pth")
    loaded = load(tmp_path / "blip2.pth", options=HEADS)
    nn.init.ones_(loaded.model.encoders["image"].stages[0].layers[0].attention.qkv.bias.data)
    with pytest.raises(ValueError, match="was trained where"):
        original(tensors(loaded), loaded.family.rules(loaded.described))


def test_a_file_without_the_frozen_encoder_of_pictures_says_so(first_stage, tmp_path):
    reference, _, held = first_stage
    trained = {name: tensor for name, tensor in held.items() if not name.startswith("visual_encoder.")}
    torch.save({"model": trained}, tmp_path / "blip2.pth")
    with pytest.raises(ValueError, match=r"does not say vision: give options=\{'vision'"):
        load(tmp_path / "blip2.pth", options=HEADS)
    loaded = load(tmp_path / "blip2.pth", options={"text_heads": 3, "vision": VISION})
    new = {item.name for line in loaded.report.of("new") for item in line.targets}
    tower = {name for name in loaded.model.state_dict() if name.startswith("encoders.image.")}
    configured = {name for name in tower if "normalize" in name}
    assert new == {name for name in tower if not name.startswith("encoders.image.stages.0.norm.")} - configured
    norm = loaded.model.encoders["image"].stages[0].norm
    assert torch.equal(norm.weight, reference.vision_model.post_layernorm.weight)
    with pytest.raises(MisfitError, match="mismatched"):
        load(tmp_path / "blip2.pth", options={"text_heads": 3, "vision": VISION | {"hidden_size": 22}})
