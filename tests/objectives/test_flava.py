"""FLAVA's six losses, each as an objective on the model that its checkpoint becomes, against transformers'."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmformer.batch import Ragged
from mmformer.checkpoints.load import load
from mmformer.losses.masking import Blocks
from mmformer.losses.matching import excluded
from mmformer.objectives import Codes, Masked, Matching, Words
from mmformer.objectives.space import Space, embed
from tests.checkpoints.families.fused import WORDS, Pairs, texts
from tests.checkpoints.oracles import saved, scramble

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")

MASK, SPECIAL, PATCHES, CODES = 3, (0, 1, 2), 16, 37


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flava")
    part = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 34}
    config = transformers.FlavaConfig(
        image_config={**part, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4, "vocab_size": CODES},
        text_config={**part, "num_hidden_layers": 2, "vocab_size": WORDS, "max_position_embeddings": 15},
        multimodal_config={**part, "num_hidden_layers": 2},
        image_codebook_config={"num_groups": 4, "hidden_size": 8, "num_blocks_per_group": 1, "vocab_size": CODES},
        hidden_size=24,
        projection_dim=18,
        init_codebook=False,
    )
    theirs = scramble(transformers.FlavaForPreTraining(config))
    return theirs, saved(theirs, folder)


class Labels(nn.Module):
    """A codec of which each cell has the id that the test says."""

    def __init__(self, ids: torch.Tensor):
        super().__init__()
        self.ids = ids

    def codes_of(self, items: Ragged) -> Ragged:
        return replace(items, values=self.ids[list(items.rows)].reshape(-1, 1))


class Case:
    """Ours and theirs from one file, pairs of a picture and a text, and the ids of the patches."""

    def __init__(self, reference):
        self.theirs, folder = reference
        loaded = load(folder)
        self.model, self.contrastive = loaded.model.train(), loaded.objectives["contrastive"].train()
        self.pairs = Pairs(texts((6, 9, 4, 13, 9)))
        self.labels = torch.randint(0, CODES, (len(self.pairs.batch), PATCHES))
        self.choice = Blocks(0.4, 3)

    def words(self, head: str) -> Words:
        return Words(head, MASK, WORDS, SPECIAL, share=0.4)

    def patches(self, head: str) -> Codes:
        return Codes(head, self.choice, Labels(self.labels), (CODES,))

    def ours(self, objective, batch, encoded=None):
        """The losses, and what was hidden."""
        encoded = self.model.encode(batch) if encoded is None else encoded
        torch.manual_seed(11)
        losses = objective(self.model, encoded, batch)
        torch.manual_seed(11)
        return losses, objective._hide(self.model, encoded, batch, list(range(len(batch))))[1]

    def given(self, riddles) -> dict[str, torch.Tensor]:
        """What was hidden, as transformers takes it."""
        out = {}
        if "text" in riddles:
            riddle, ids = riddles["text"], self.pairs.ids.clone()
            labels = torch.full_like(ids, -100)
            chosen = torch.zeros(len(riddle.items.values), dtype=torch.bool)
            chosen[riddle.cells] = True
            lengths = [shape[0] for shape in riddle.items.shapes]
            for (row, shown), hit, length in zip(riddle.items.items(), chosen.split(lengths), lengths, strict=True):
                ids[row, :length] = shown
                labels[row, :length] = torch.where(hit, self.pairs.ids[row, :length], -100)
            out |= {"input_ids_masked": ids, "mlm_labels": labels}
        if "image" in riddles:
            hidden = torch.from_numpy(riddles["image"].items.hidden).view(-1, PATCHES)
            order = torch.tensor(riddles["image"].items.rows).argsort()
            out |= {"bool_masked_pos": hidden[order], "mim_labels": self.labels.clone()}
        return out


MIXED, SEEN = "flava.multimodal_model.encoder", "flava.image_model.encoder"
GRADIENTS = {
    "encoders.text.embedder.table.weight": "flava.text_model.embeddings.word_embeddings.weight",
    "encoders.image.embedder.class_tokens.tokens": "flava.image_model.embeddings.cls_token",
    "encoders.image.embedder.mask.vector": "flava.image_model.embeddings.mask_token",
    "fusion.latents": "flava.multimodal_model.cls_token",
    "fusion.entrances.text.part.weight": "flava.text_to_mm_projection.weight",
    "fusion.transformer.layers.1.feedforward.up.weight": f"{MIXED}.layer.1.intermediate.dense.weight",
    "encoders.image.stages.0.layers.1.attention.out.weight": f"{SEEN}.layer.1.attention.output.dense.weight",
    "heads.mlm.out.weight": "mlm_head.decoder.weight",
    "heads.mim.out.weight": "mim_head.decoder.weight",
    "heads.mmm_text.out.weight": "mmm_text_head.decoder.weight",
    "heads.mmm_image.out.weight": "mmm_image_head.decoder.weight",
    "heads.match.2.weight": "itm_head.seq_relationship.weight",
}


def same(case: Case, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """One loss and its gradients, where they lie in tensors of both."""
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    case.model.zero_grad()
    case.theirs.zero_grad()
    ours.backward(retain_graph=True)
    theirs.backward(retain_graph=True)
    mine, wanted = dict(case.model.named_parameters()), dict(case.theirs.named_parameters())
    moved = 0
    for name, other in GRADIENTS.items():
        gradient, expected = mine[name].grad, wanted[other].grad
        assert (gradient is None or not gradient.any()) == (expected is None or not expected.any()), name
        if gradient is not None and expected is not None and expected.any():
            torch.testing.assert_close(gradient, expected.view_as(gradient), rtol=1e-4, atol=1e-6, msg=name)
            moved += 1
    assert moved


def test_words_of_a_text_alone(reference):
    case = Case(reference)
    batch = case.pairs.batch.only(["text"])
    losses, riddles = case.ours(Masked({"text": case.words("mlm")}, source="text", lacks=["image"]), batch)
    given = case.given(riddles)
    output = case.theirs(input_ids=case.pairs.ids, attention_mask=case.pairs.mask, return_loss=True, **given)
    same(case, losses["loss"], output.loss_info.mlm)


def test_patches_of_a_picture_alone(reference):
    case = Case(reference)
    batch = case.pairs.batch.only(["image"])
    losses, riddles = case.ours(Masked({"image": case.patches("mim")}, source="image", lacks=["text"]), batch)
    output = case.theirs(pixel_values=case.pairs.pixels, return_loss=True, **case.given(riddles))
    same(case, losses["loss"], output.loss_info.mim)


def test_words_and_patches_of_pairs_and_what_they_have_in_common(reference):
    case = Case(reference)
    batch = case.pairs.batch
    encoded = case.model.encode(batch)
    losses, riddles = case.ours(
        Masked({"text": case.words("mmm_text"), "image": case.patches("mmm_image")}), batch, encoded
    )
    found = case.contrastive(case.model, encoded, batch)
    output = case.theirs(
        input_ids=case.pairs.ids, pixel_values=case.pairs.pixels, attention_mask=case.pairs.mask, return_loss=True,
        itm_labels=torch.ones(len(batch), dtype=torch.long), **case.given(riddles),
    )  # fmt: skip
    same(case, losses["text"], output.loss_info.mmm_text)
    same(case, losses["image"], output.loss_info.mmm_image)
    same(case, torch.stack(list(found.values())).sum(), output.loss_info.global_contrastive)


def test_pairs_that_match_from_those_that_do_not_while_parts_are_hidden(reference, monkeypatch):
    case = Case(reference)
    batch, drawn = case.pairs.batch, []
    matching = Matching(["image", "text"], "match", excluded, 0)
    draw = matching._draw
    monkeypatch.setattr(matching, "_draw", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    encoded = case.model.encode(batch)
    vectors = embed(case.model, encoded, ["image", "text"])
    encoded.shared[Space] = Space.of(vectors, vectors, torch.tensor(14.0))
    puzzles = {"text": case.words("mmm_text"), "image": case.patches("mmm_image")}
    losses, riddles = case.ours(Masked(puzzles, beside={"match": matching}), batch, encoded)
    given = case.given(riddles)
    image, text = drawn[0]["image"], drawn[0]["text"]
    labels = (torch.arange(3 * len(batch)) < len(batch)).long()
    output = case.theirs(
        input_ids=case.pairs.ids[text], pixel_values=case.pairs.pixels[image], attention_mask=case.pairs.mask[text],
        input_ids_masked=given["input_ids_masked"][text], mlm_labels=given["mlm_labels"][text],
        bool_masked_pos=given["bool_masked_pos"][image], mim_labels=given["mim_labels"][image], itm_labels=labels,
        return_loss=True,
    )  # fmt: skip
    same(case, losses["match_image_text"], output.loss_info.itm)
    same(case, losses["text"], output.loss_info.mmm_text)  # only over pairs that match
    same(case, losses["image"], output.loss_info.mmm_image)
    assert math.isfinite(losses["match_image_text"].item())
