"""ALBEF's code is not at hand: timm's ViT and layers of transformers' BLIP are put together here as its paper says."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mmformer.checkpoints.families.salesforce import MOMENTUM, QUEUE
from mmformer.checkpoints.load import load, load_into
from mmformer.checkpoints.plan import original
from mmformer.checkpoints.report import MisfitError
from tests.checkpoints.families.fused import WORDS, Pairs, moves, reasons, rows, texts
from tests.checkpoints.families.visions import epsilons, tensors
from tests.checkpoints.oracles import close, scramble

transformers = pytest.importorskip("transformers", reason="the oracle of texts: pip install mmformer[transformers]")
timm = pytest.importorskip("timm", reason="the oracle of pictures: pip install mmformer[timm]")

BELOW, DEPTH, SHARED, TEMP = 2, 5, 14, 0.05
TEXT = {
    "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": WORDS,
    "max_position_embeddings": 15,
}  # fmt: skip
HEADS = {"num_heads": 2, "text_heads": 3}


def bert(depth: int, context: int):
    """A BERT with cross-attention in every layer."""
    config = transformers.BlipTextConfig(**TEXT, num_hidden_layers=depth, encoder_hidden_size=context)
    return transformers.BlipTextModel(config, add_pooling_layer=False)


class Albef(nn.Module):
    """What ALBEF computes: two kinds of text, the lower layers without the picture, the upper ones with it."""

    def __init__(self):
        super().__init__()
        from transformers.models.bert.modeling_bert import BertOnlyMLMHead

        self.visual = timm.models.vision_transformer.VisionTransformer(
            img_size=16, patch_size=4, embed_dim=20, depth=3, num_heads=2, mlp_ratio=2.2, num_classes=0
        )
        self.text, self.types = bert(DEPTH, 20), nn.Embedding(2, 24)
        self.cls = BertOnlyMLMHead(transformers.BertConfig(**TEXT))
        self.vision_proj, self.text_proj, self.itm_head = nn.Linear(20, SHARED), nn.Linear(24, SHARED), nn.Linear(24, 2)
        scramble(self)
        self.cls.predictions.decoder.weight = self.text.embeddings.word_embeddings.weight
        self.cls.predictions.bias = self.cls.predictions.decoder.bias

    def alone(self, ids: Tensor) -> Tensor:
        return through(self.text.encoder.layer[:BELOW], embedded(self.text, self.types, ids))

    def beside(self, pixels: Tensor, ids: Tensor) -> Tensor:
        return through(self.text.encoder.layer[BELOW:], self.alone(ids), self.visual.forward_features(pixels))

    def tensors(self) -> dict[str, Tensor]:
        """Under ALBEF's names, without what its training adds."""
        skipped = tuple(f"encoder.layer.{i}.crossattention." for i in range(BELOW))
        text = {name: t for name, t in self.text.state_dict().items() if not name.startswith(skipped)}
        held = {f"visual_encoder.{name}": tensor for name, tensor in self.visual.state_dict().items()}
        held |= {f"text_encoder.bert.{name}": tensor for name, tensor in text.items()}
        held["text_encoder.bert.embeddings.token_type_embeddings.weight"] = self.types.weight.detach()
        held |= {f"text_encoder.cls.{name}": tensor for name, tensor in self.cls.state_dict().items()}
        for name in ("vision_proj", "text_proj", "itm_head"):
            held |= {f"{name}.{kind}": tensor for kind, tensor in getattr(self, name).state_dict().items()}
        return held


def embedded(text, types, ids: Tensor) -> Tensor:
    found = text.embeddings.word_embeddings(ids) + text.embeddings.position_embeddings.weight[: ids.shape[1]]
    return text.embeddings.LayerNorm(found + types.weight[0])


def through(layers, states: Tensor, context: Tensor | None = None) -> Tensor:
    for layer in layers:
        states = layer(states, encoder_hidden_states=context)
    return states


def pretrained(reference: Albef) -> dict[str, Tensor]:
    """A file of the pre-training: beside the model its momentum copy, queues, and buffers."""
    held = reference.tensors()
    held["text_encoder.bert.embeddings.position_ids"] = torch.arange(15)[None]
    copies = [name for name in held if not name.startswith("itm_head")]
    held |= {name.replace(".", "_m.", 1): held[name] + 1 for name in copies}
    queues = {"image_queue": torch.randn(SHARED, 8), "text_queue": torch.randn(SHARED, 8), "queue_ptr": torch.zeros(1)}
    return held | queues | {"temp": torch.tensor(TEMP)}


@pytest.fixture
def reference():
    return Albef()


def test_albef_gives_what_its_parts_give(reference, tmp_path):
    held = pretrained(reference)
    torch.save({"model": held, "optimizer": {}, "epoch": 29}, tmp_path / "ALBEF.pth")
    loaded = load(tmp_path / "ALBEF.pth", options=HEADS)
    assert loaded.family.name == "albef"
    assert loaded.report.ok, str(loaded.report)
    aside = reasons(loaded)
    copies = {name for name in held if name.split(".")[0].endswith("_m")}
    assert {name for name, reason in aside.items() if reason == MOMENTUM} == copies
    assert {name for name, reason in aside.items() if reason == QUEUE} == {"image_queue", "text_queue", "queue_ptr"}
    assert set(aside) - copies == {
        "image_queue", "text_queue", "queue_ptr", "text_encoder.bert.embeddings.position_ids",
        "text_encoder.cls.predictions.bias",
    }  # fmt: skip
    model, pairs = loaded.model, Pairs()
    with torch.inference_mode():
        encoded = model.encode(pairs.batch)
        alone = [reference.alone(ids)[0] for _, ids in pairs]
        beside = [reference.beside(pixels, ids)[0] for pixels, ids in pairs]
        close(torch.cat(rows(encoded["text"])), torch.cat(alone))
        close(torch.cat(rows(model.fuse(encoded))), torch.cat(beside))
        judged = torch.stack([reference.itm_head(states[0]) for states in beside])
        close(model.output(encoded, "match")[0], judged)
        words = torch.cat([reference.cls(states) for states in beside])
        close(torch.cat([model.heads["vocabulary"](x) for x in rows(model.fuse(encoded))]), words)
        unit = partial(nn.functional.normalize, dim=-1)
        image = unit(reference.vision_proj(reference.visual.forward_features(pairs.pixels)[:, 0]))
        text = unit(reference.text_proj(torch.stack([states[0] for states in alone])))
        ours = [model.output(encoded, name, name)[0] for name in ("image", "text")]
        close(ours[0] @ ours[1].T, image @ text.T)
        (loss,) = loaded.objectives["contrastive"](model, encoded, pairs.batch).values()
        target = torch.arange(len(pairs.texts))
        both = [nn.functional.cross_entropy(scores / TEMP, target) for scores in (image @ text.T, text @ image.T)]
        close(loss, sum(both) / 2)
    encoded = model.encode(pairs.batch)
    outs = [model.output(encoded, "match")[0], model.heads["vocabulary"](model.fuse(encoded).x)]
    outs += loaded.objectives["contrastive"](model, encoded, pairs.batch).values()
    moves(loaded, *outs)
    assert epsilons(model.encoders["image"]) == {1e-6}
    assert epsilons(model.encoders["text"]) == epsilons(model.fusion) == {1e-12}

    made = original(tensors(loaded), loaded.family.rules(loaded.described))
    kept = {name: tensor for name, tensor in held.items() if name not in aside}
    assert made.keys() == kept.keys()
    torch.testing.assert_close(made.pop("temp"), kept.pop("temp"), rtol=3e-7, atol=0)
    assert all(torch.equal(made[name], tensor) for name, tensor in kept.items())


def test_files_of_tasks_leave_out_a_step_of_the_names_and_heads(reference, tmp_path):
    """Retrieval in ALBEF's code and in LAVIS: the encoder without the scores of words, and without its `bert.`."""
    held = {
        name.replace("text_encoder.bert.", "text_encoder."): tensor
        for name, tensor in reference.tensors().items()
        if ".cls." not in name
    }
    torch.save({"model": held}, tmp_path / "retrieval.pth")
    loaded = load(tmp_path / "retrieval.pth", options=HEADS)
    assert loaded.report.ok, str(loaded.report)
    assert not loaded.report.of("ignored")
    assert not loaded.objectives
    pairs = Pairs()
    with torch.inference_mode():
        judged = [reference.itm_head(reference.beside(pixels, ids)[:, 0]) for pixels, ids in pairs]
        close(loaded.model.output(loaded.model.encode(pairs.batch), "match")[0], torch.cat(judged))
    made = original(tensors(loaded), loaded.family.rules(loaded.described))
    assert made.keys() == held.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in held.items())


def test_answers_look_at_questions_that_looked_at_the_picture(reference, tmp_path):
    decoder, types = scramble(bert(3, 24), seed=2), scramble(nn.Embedding(2, 24), seed=4)
    held = {
        name.replace("text_encoder.bert.", "text_encoder.").replace("text_encoder.cls.", "text_decoder.cls."): tensor
        for name, tensor in reference.tensors().items()
        if name.startswith(("visual_encoder.", "text_encoder."))
    }
    held |= {f"text_decoder.bert.{name}": tensor for name, tensor in decoder.state_dict().items()}
    held["text_decoder.bert.embeddings.token_type_embeddings.weight"] = types.weight.detach()
    scores = "text_decoder.cls.predictions.decoder.weight"
    held[scores] = held["text_decoder.bert.embeddings.word_embeddings.weight"]
    reference.cls.predictions.decoder.weight = nn.Parameter(held[scores])
    held |= {
        name.replace("text_decoder.", "text_decoder_m."): tensor for name, tensor in held.items() if "decoder" in name
    }
    torch.save({"model": held}, tmp_path / "vqa.pth")
    loaded = load(tmp_path / "vqa.pth", options=HEADS)
    assert loaded.family.name == "albef"
    assert loaded.report.ok, str(loaded.report)
    answers = texts((3, 2, 5, 1, 7), seed=8)
    model, pairs = loaded.model, Pairs(answer=answers)
    theirs = []
    with torch.inference_mode():
        for (pixels, question), answer in zip(pairs, answers, strict=True):
            asked = reference.beside(pixels, question)
            states = embedded(decoder, types, answer[None])
            mask = torch.full((len(answer), len(answer)), -torch.inf).triu(1)[None, None]
            for layer in decoder.encoder.layer:
                states = layer(states, encoder_hidden_states=asked, attention_mask=mask)
            theirs.append(reference.cls(states[0]))
        ours = [model.heads["vocabulary"](states) for states in rows(model.fuse(model.encode(pairs.batch)))]
        close(torch.cat(ours), torch.cat(theirs))
    moves(loaded, model.heads["vocabulary"](model.fuse(model.encode(pairs.batch)).x))
    made = original(tensors(loaded), loaded.family.rules(loaded.described))
    kept = {name: tensor for name, tensor in held.items() if name not in reasons(loaded)}
    assert made.keys() == kept.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in kept.items())


def test_training_state_is_left_out_of_a_model_of_ones_own_too(reference, tmp_path):
    torch.save({"model": pretrained(reference)}, tmp_path / "ALBEF.pth")
    loaded = load(tmp_path / "ALBEF.pth", options=HEADS)
    report = load_into(loaded.model, tmp_path / "ALBEF.pth", options=HEADS, new=["heads.match.*"])
    notes = {item.name: line.note for line in report.of("ignored") for item in line.sources}
    assert notes["temp"] == "belongs to an objective"
    assert notes["itm_head.weight"] == "heads.match.weight stays new"
    tower = load(tmp_path / "ALBEF.pth", options=HEADS, part="encoders.text")
    assert tower.report.ok
    wanted = loaded.model.encoders["text"].state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tower.model.state_dict().items())


def test_what_is_damaged_is_named(reference, tmp_path):
    held = reference.tensors()
    lower = "text_encoder.bert.encoder.layer.1.crossattention.self.key.weight"
    torch.save({"model": held | {lower: torch.randn(24, 20)}}, tmp_path / "one_more.pth")
    with pytest.raises(MisfitError, match=r"unexpected|needs .*layer\.1\.crossattention"):
        load(tmp_path / "one_more.pth", options=HEADS)
    torch.save({"model": held}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"does not say num_heads"):
        load(tmp_path / "bare.pth")
    del held["text_encoder.bert.encoder.layer.3.crossattention.output.dense.weight"]
    torch.save({"model": held}, tmp_path / "one_less.pth")
    with pytest.raises(
        MisfitError, match=r"missing: fusion.transformer.layers.1.cross.out.weight.*layer.3.crossattention"
    ):
        load(tmp_path / "one_less.pth", options=HEADS)
