"""BLIP's three objectives over one stack of layers, against transformers, which keeps encoder and decoder apart."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from mmformer.checkpoints.load import load
from mmformer.losses.matching import floored
from mmformer.model import Model
from mmformer.nn import ByCausality
from mmformer.objectives import Matching, NextToken, StartingWith
from mmformer.objectives.rerank import match_scores
from mmformer.objectives.space import Pairs as Chosen
from mmformer.objectives.space import Space, embed
from mmformer.objectives.starting import starting_with
from mmformer.visibility import Visibility
from tests.checkpoints.families.fused import WORDS, Pairs, loaded_from
from tests.checkpoints.families.test_blip import config
from tests.checkpoints.oracles import close, saved, scramble

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")

ENC, DEC, PAIR = WORDS - 1, WORDS - 2, ["text", "image"]


def one_stack(reads: Model, writes: Model) -> Model:
    """The model that reads, whose layers have the self-attention of the one that writes for when they are causal."""
    layers = torch.nn.ModuleList()
    for full, causal in zip(reads.fusion.transformer.layers, writes.fusion.transformer.layers, strict=True):
        halves = [deepcopy(full), deepcopy(causal)]
        for half in halves:
            half.cross = half.cross_norm = half.feedforward = half.feedforward_norm = None
        by = ByCausality(1, lambda _, halves=halves: halves[0])
        by.full, by.causal = halves
        rest = deepcopy(full)
        rest.attention = rest.attention_norm = None
        layers += [by, rest]
    fusion = deepcopy(reads.fusion)
    fusion.transformer.layers = layers
    heads = {name: head for name, head in reads.heads.items()} | {"vocabulary": deepcopy(writes.heads["vocabulary"])}
    return Model(dict(reads.encoders), fusion, heads, dict(reads.views)).eval()


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """Ours, and the two of transformers, which share all but self-attention."""
    reads = transformers.BlipForImageTextRetrieval(config())
    writes = transformers.BlipForConditionalGeneration(config(text={"label_smoothing": 0.1}))
    first = loaded_from(reads, tmp_path_factory.mktemp("reads")).model
    scramble(writes, seed=1)
    held = reads.text_encoder.state_dict()
    shared = {name: held[name] for name in held if ".attention." not in name}
    writes.text_decoder.bert.load_state_dict(shared, strict=False)
    writes.vision_model.load_state_dict(reads.vision_model.state_dict())
    second = load(saved(writes, tmp_path_factory.mktemp("writes"))).model
    return one_stack(first, second), reads, writes


def starting(ids: torch.Tensor, first: int) -> torch.Tensor:
    return torch.cat([torch.full_like(ids[:, :1], first), ids[:, 1:]], 1)


def test_one_stack_judges_and_embeds_as_the_reference_does(systems):
    model, reads, _ = systems
    pairs = Pairs()
    with torch.inference_mode():
        ids = starting(pairs.ids, ENC)
        judged = reads(ids, pairs.pixels, attention_mask=pairs.mask).itm_score[:, 1]
        encoded = StartingWith(NextToken("vocabulary"), ENC).reread(model, model.encode(pairs.batch), pairs.batch)[0]
        every = list(range(len(pairs.texts)))
        close(match_scores(model, "match", encoded, {"text": every, "image": every}), judged)
        alone = reads(pairs.ids, pairs.pixels, attention_mask=pairs.mask, use_itm_head=False)
        rows = embed(model, model.encode(pairs.batch), PAIR)
        close(rows["image"] @ rows["text"].T, alone.itm_score)


def test_the_loss_of_writing_is_that_of_the_reference_with_its_gradients(systems):
    model, _, writes = systems
    pairs = Pairs()
    ids = starting(pairs.ids, DEC)
    labels = torch.where(pairs.mask.bool(), ids, -100)
    theirs = writes(pairs.pixels, ids, attention_mask=pairs.mask, labels=labels).loss
    caption = StartingWith(NextToken("vocabulary", smoothing=0.1, visibility=Visibility(causal=True)), DEC)
    ours = caption(model, model.encode(pairs.batch), pairs.batch)["loss"]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    mine = torch.autograd.grad(ours, model.heads["vocabulary"].transform[0].weight)[0]
    wanted = writes.text_decoder.cls.predictions.transform.dense.weight
    torch.testing.assert_close(mine, torch.autograd.grad(theirs, wanted)[0], rtol=1e-4, atol=1e-6)


def test_the_negatives_are_read_behind_the_id_of_their_own(systems):
    model, reads, _ = systems
    pairs = Pairs()
    encoded = model.encode(pairs.batch)
    rows = {name: vectors.detach() for name, vectors in embed(model, encoded, PAIR).items()}
    encoded.shared[Space] = Space.of(rows, rows, torch.tensor(5.0))
    matching = Matching(PAIR, "match", floored, top=0)
    torch.manual_seed(3)
    loss = StartingWith(matching, ENC)(model, encoded, pairs.batch)["text_image"]
    torch.manual_seed(3)
    drawn = matching._draw(encoded.shared[Space], ("text", "image"), Chosen.of(pairs.batch, PAIR, None), pairs.batch)
    texts, images = (torch.tensor(drawn[name]) for name in PAIR)
    scores = reads(starting(pairs.ids, ENC)[texts], pairs.pixels[images], attention_mask=pairs.mask[texts]).itm_score
    target = (torch.arange(len(texts)) < len(texts) // 3).long()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, target), rtol=1e-5, atol=1e-6)
    assert starting_with(pairs.batch.inputs["text"], ENC).shapes == pairs.batch.inputs["text"].shapes
