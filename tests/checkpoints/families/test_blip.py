from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmformer.batch import Ragged
from mmformer.checkpoints.families.salesforce import MOMENTUM, QUEUE
from mmformer.checkpoints.load import load
from mmformer.checkpoints.plan import original
from mmformer.checkpoints.report import MisfitError
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

TEXT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": WORDS,
    "max_position_embeddings": 15, "bos_token_id": 58, "sep_token_id": 59,
}  # fmt: skip
SHARED = 14
PAIR = ["image", "text"]


def config(text=(), vision=()):
    return transformers.BlipConfig(
        text_config=TEXT | dict(text), vision_config=VISION | dict(vision), image_text_hidden_size=SHARED
    )


def test_retrieval_gives_cosines_and_judgements_of_the_reference(tmp_path):
    reference = transformers.BlipForImageTextRetrieval(config())
    loaded = loaded_from(reference, tmp_path)
    model, pairs = loaded.model, Pairs()
    with torch.inference_mode():
        encoded = model.encode(pairs.batch)
        judged = model.output(encoded, "match")[0]
        image, text = (model.output(encoded, name, name)[0] for name in ("image", "text"))
        beside = reference(pairs.ids, pairs.pixels, attention_mask=pairs.mask)
        alone = reference(pairs.ids, pairs.pixels, attention_mask=pairs.mask, use_itm_head=False)
        close(judged, beside.itm_score)
        close(image @ text.T, alone.itm_score)
        close(torch.cat(rows(model.fuse(encoded))), beside.question_embeds[pairs.mask.bool()])
        close(torch.cat(rows(model.fuse(encoded.only(["text"])))), alone.question_embeds[pairs.mask.bool()])
    encoded = model.encode(pairs.batch)
    moves(loaded, model.output(encoded, "match")[0], *(model.output(encoded, n, n)[0] for n in ("image", "text")))
    into_its_class(loaded, reference, tmp_path)


def test_a_text_without_a_picture_skips_cross_attention_beside_others_that_have_one(tmp_path):
    """ITC and ITM are one stack of layers: what a sample lacks decides, not a mode of the model."""
    loaded = loaded_from(transformers.BlipForImageTextRetrieval(config()), tmp_path)
    model, pairs = loaded.model, Pairs()
    some = Pairs(pairs.texts)
    some.batch.inputs["image"] = Ragged.stack(list(pairs.images[:3]), [0, 1, 2], 1)
    with torch.inference_mode():
        mixed = rows(model.fuse(model.encode(some.batch)))
        both, alone = (rows(model.fuse(model.encode(pairs.batch).only(names))) for names in (PAIR, ["text"]))
    for row, (ours, beside, without) in enumerate(zip(mixed, both, alone, strict=True)):
        close(ours, beside if row < 3 else without)
        assert (beside - without).abs().max() > 0.1


def test_captions_give_the_scores_of_the_reference(tmp_path):
    reference = transformers.BlipForConditionalGeneration(config())
    loaded = loaded_from(reference, tmp_path)
    model, pairs = loaded.model, Pairs()
    with torch.inference_mode():
        theirs = [reference(pixels, ids).logits[0] for pixels, ids in pairs]
        ours = [model.heads["vocabulary"](states) for states in rows(model.fuse(model.encode(pairs.batch)))]
        close(torch.cat(ours), torch.cat(theirs))
    moves(loaded, model.heads["vocabulary"](model.fuse(model.encode(pairs.batch)).x))
    into_its_class(loaded, reference, tmp_path)


def test_answers_look_at_questions_that_looked_at_the_picture(tmp_path):
    # transformers builds the decoder for a context as wide as the picture, and gives it the question
    reference = transformers.BlipForQuestionAnswering(config(vision={"hidden_size": 24}))
    loaded = loaded_from(reference, tmp_path)
    answers = texts((3, 2, 5, 1, 7), seed=8)
    model, pairs = loaded.model, Pairs(answer=answers)
    theirs, losses = [], []
    with torch.inference_mode():
        for (pixels, question), answer in zip(pairs, answers, strict=True):
            image = reference.vision_model(pixels).last_hidden_state
            asked = reference.text_encoder(question, encoder_hidden_states=image).last_hidden_state
            theirs.append(reference.text_decoder(answer[None], encoder_hidden_states=asked).logits[0])
            if len(answer) > 1:
                mask = torch.ones_like(question)
                losses.append(reference(question, pixels, attention_mask=mask, labels=answer[None]).loss)
        ours = [model.heads["vocabulary"](states) for states in rows(model.fuse(model.encode(pairs.batch)))]
        close(torch.cat(ours), torch.cat(theirs))
        mine = [
            nn.functional.cross_entropy(scores[:-1], answer[1:])
            for scores, answer in zip(ours, answers, strict=True)
            if len(answer) > 1
        ]
        close(torch.stack(mine), torch.stack(losses), 1e-6)
    moves(loaded, model.heads["vocabulary"](model.fuse(model.encode(pairs.batch)).x))
    into_its_class(loaded, reference, tmp_path)


def test_published_files_repeat_the_tied_scores_and_hold_buffers(tmp_path):
    reference = transformers.BlipForConditionalGeneration(config())
    saved(scramble(reference), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    scores = "text_decoder.cls.predictions."
    held[f"{scores}decoder.weight"] = held["text_decoder.bert.embeddings.word_embeddings.weight"].clone()
    held[f"{scores}decoder.bias"] = held[f"{scores}bias"].clone()
    held["text_decoder.bert.embeddings.position_ids"] = torch.arange(15)[None]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    assert loaded.report.ok, str(loaded.report)
    assert reasons(loaded) == {
        "text_decoder.bert.embeddings.position_ids": "a buffer that counts 0, 1, 2, ...",
        f"{scores}bias": "decoder.bias is the one in use",
    }
    pairs = Pairs()
    pixels, ids = next(iter(pairs))
    with torch.inference_mode():
        states = rows(loaded.model.fuse(loaded.model.encode(pairs.batch)))[0]
        close(loaded.model.heads["vocabulary"](states), reference(pixels, ids).logits[0])


def test_pictures_of_another_size_interpolate_positions_as_the_reference_does(tmp_path):
    reference = scramble(transformers.BlipForImageTextRetrieval(config()))
    loaded = load(saved(reference, tmp_path), options={"image_size": 24})
    pairs = Pairs(side=24)
    with torch.inference_mode():
        theirs = reference(pairs.ids, pairs.pixels, attention_mask=pairs.mask, interpolate_pos_encoding=True)
        close(loaded.model.output(loaded.model.encode(pairs.batch), "match")[0], theirs.itm_score)


@pytest.mark.parametrize("side", ["text", "vision"])
def test_the_activation_is_the_configs_and_the_bar_tells_them_apart(side, tmp_path):
    reference = transformers.BlipForImageTextRetrieval(config(**{side: {"hidden_act": "gelu_pytorch_tanh"}}))
    loaded = loaded_from(reference, tmp_path)
    pairs = Pairs()
    with torch.inference_mode():
        theirs = reference(pairs.ids, pairs.pixels, attention_mask=pairs.mask).itm_score
        close(loaded.model.output(loaded.model.encode(pairs.batch), "match")[0], theirs)
        stack = loaded.model.fusion.transformer if side == "text" else loaded.model.encoders["image"].stages[0]
        for layer in stack.layers:
            layer.feedforward.activation = nn.GELU()
        with pytest.raises(AssertionError, match="differs by"):
            close(loaded.model.output(loaded.model.encode(pairs.batch), "match")[0], theirs)


def test_epsilons_are_those_of_the_config(tmp_path):
    loaded = loaded_from(
        transformers.BlipForImageTextRetrieval(config({"layer_norm_eps": 3e-7}, {"layer_norm_eps": 2e-5})), tmp_path
    )
    assert epsilons(loaded.model.encoders["image"]) == {2e-5}
    assert epsilons(loaded.model.fusion) == {3e-7}


TEMP = 0.05


def pretrained():
    """A file of BLIP's own pre-training, made of two references that share the encoder of pictures."""
    narrow = config(vision={"layer_norm_eps": 1e-6})  # the original writes it into its code
    retrieval = scramble(transformers.BlipForImageTextRetrieval(narrow))
    caption = scramble(transformers.BlipForConditionalGeneration(narrow), seed=1)
    caption.vision_model.load_state_dict(retrieval.vision_model.state_dict())
    held = timm_names(retrieval.vision_model.state_dict())
    held |= {name: t for name, t in retrieval.state_dict().items() if not name.startswith("vision_model.")}
    held |= {name: t for name, t in caption.state_dict().items() if not name.startswith("vision_model.")}
    held["text_encoder.embeddings.position_ids"] = torch.arange(15)[None]
    copies = [
        name for name in held if name.split(".")[0] in ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
    ]
    held |= {name.replace(".", "_m.", 1): held[name] + 1 for name in copies}
    held |= {
        "image_queue": torch.randn(SHARED, 8),
        "text_queue": torch.randn(SHARED, 8),
        "queue_ptr": torch.zeros(1).long(),
    }
    return held | {"temp": torch.tensor(TEMP)}, retrieval, caption


def test_a_file_of_the_original_holds_several_tasks(tmp_path):
    held, retrieval, caption = pretrained()
    torch.save({"model": held, "epoch": 3}, tmp_path / "model_base.pth")
    heads = {"num_heads": 2, "text_heads": 3}
    loaded = load(tmp_path / "model_base.pth", options=heads)
    assert (loaded.family.library, loaded.family.name) == ("salesforce", "blip")
    assert loaded.report.ok, str(loaded.report)
    aside = reasons(loaded)
    assert {reason for name, reason in aside.items() if name.split(".")[0].endswith("_m")} == {MOMENTUM}
    assert {name for name, reason in aside.items() if reason == QUEUE} == {"image_queue", "text_queue", "queue_ptr"}
    assert {name for name, reason in aside.items() if "task" in reason} == {
        n for n in held if n.startswith("text_decoder.")
    }
    model, pairs = loaded.model, Pairs()
    with torch.inference_mode():
        encoded = model.encode(pairs.batch)
        theirs = retrieval(pairs.ids, pairs.pixels, attention_mask=pairs.mask)
        close(model.output(encoded, "match")[0], theirs.itm_score)
        cosines = retrieval(pairs.ids, pairs.pixels, attention_mask=pairs.mask, use_itm_head=False).itm_score
        (loss,) = loaded.objectives["contrastive"](model, encoded, pairs.batch).values()
        target = torch.arange(len(cosines))
        both = [nn.functional.cross_entropy(scores / TEMP, target) for scores in (cosines, cosines.T)]
        close(loss, sum(both) / 2)

    decoder = load(tmp_path / "model_base.pth", options=heads | {"task": "caption"})
    assert decoder.report.ok, str(decoder.report)
    with torch.inference_mode():
        theirs = [caption(pixels, ids).logits[0] for pixels, ids in pairs]
        ours = rows(decoder.model.fuse(decoder.model.encode(pairs.batch)))
        close(torch.cat([decoder.model.heads["vocabulary"](x) for x in ours]), torch.cat(theirs))

    made = original(tensors(loaded), loaded.family.rules(loaded.described))
    kept = {name: t for name, t in held.items() if name not in aside}
    assert made.keys() == kept.keys()
    torch.testing.assert_close(made.pop("temp"), kept.pop("temp"), rtol=3e-7, atol=0)
    assert all(torch.equal(made[name], tensor) for name, tensor in kept.items())


def test_what_a_file_does_not_say_or_hold_is_asked_for_by_name(tmp_path):
    held, *_ = pretrained()
    torch.save({"model": held}, tmp_path / "model_base.pth")
    with pytest.raises(ValueError, match=r"does not say num_heads: give options=\{'num_heads'"):
        load(tmp_path / "model_base.pth")
    captioner = {name: t for name, t in held.items() if name.startswith(("visual_encoder.", "text_decoder."))}
    torch.save({"model": captioner}, tmp_path / "caption.pth")
    heads = {"num_heads": 2, "text_heads": 3}
    assert load(tmp_path / "caption.pth", options=heads).described.layout["task"] == "caption"
    with pytest.raises(ValueError, match="no tensors for the task 'retrieval': it has those for caption"):
        load(tmp_path / "caption.pth", options=heads | {"task": "retrieval"})
    del captioner["text_decoder.bert.encoder.layer.1.crossattention.output.dense.bias"]
    torch.save({"model": captioner}, tmp_path / "caption.pth")
    with pytest.raises(
        MisfitError, match=r"missing: fusion.transformer.layers.1.cross.out.bias.*layer.1.crossattention"
    ):
        load(tmp_path / "caption.pth", options=heads)
