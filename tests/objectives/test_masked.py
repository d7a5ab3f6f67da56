from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmformer.batch import Batch, Ragged
from mmformer.codec import FrozenCodec
from mmformer.encoders import MaskVector, PatchDropout
from mmformer.heads import Head, VocabularyHead
from mmformer.losses.masking import Scattered, patches, standardized
from mmformer.objectives import Codes, Masked, Pixels, Words
from mmformer.objectives.objective import Objective
from mmformer.tokens import modality_id
from tests.helpers import packed_tokens, random_batch, scramble, small_model

MASK, SPECIAL = 49, (0, 1)


def model():
    """Pictures in patches of 4 x 4, spectrograms in patches of 4 frames, both with a vector for what is hidden."""
    net = small_model()
    for name in ("image", "audio"):
        net.encoders[name].embedder.mask = MaskVector(24)
    heads = {"words": VocabularyHead(24, 50), "pixels": Head(24, 48), "mels": Head(24, 20), "codes": Head(24, 7 + 5)}
    net.heads.update(heads)
    scramble(net)
    return net


class Grids(nn.Module):
    """A codec of two codebooks whose ids say which cell of all they are of."""

    def __init__(self, extra: int = 0):
        super().__init__()
        self.extra = extra

    def codes_of(self, items: Ragged) -> Ragged:
        assert items.hidden is None, "a codec must see all of it"
        count = len(items.values) // 16 + self.extra
        return replace(items, values=torch.stack([torch.arange(count) % 7, torch.arange(count) % 5], 1))


def seeded(part, *given):
    torch.manual_seed(5)
    return part(*given)


PUZZLES = {
    "text": lambda: Words("words", MASK, 50, SPECIAL, share=0.5),
    "image": lambda: Pixels("pixels", Scattered(0.4)),
    "audio": lambda: Pixels("mels", Scattered(0.4), standardize=False),
    "codes": lambda: Codes("codes", Scattered(0.4), Grids(), (7, 5)),
}


def slow_loss(net, objective, batch, name, riddle, rows):
    """One sample after another, all of its modalities, each hidden token read on its own."""
    losses, offset = [], 0
    puzzle = objective.puzzles[name]
    answers = dict(zip(riddle.cells.tolist(), riddle.answer, strict=True))
    for item, count in zip(range(len(riddle.items)), riddle.counts, strict=True):
        row = riddle.items.rows[item]
        alone = batch.select([rows[row]])
        values = list(riddle.items.items())[item][1]
        shown = Ragged.stack([values], [0], riddle.items.values.ndim - 1)
        hidden = riddle.items.hidden
        if hidden is not None:
            shown = replace(shown, hidden=hidden[offset : offset + count])
        encoded = net.encode(replace(alone, inputs=alone.inputs | {name: shown}))
        tokens = net.fuse(encoded)
        own = tokens.x[0][tokens.modality[0] == modality_id(name)]
        for cell in range(count):
            if offset + cell in answers:
                guess = net.heads[puzzle.head](own[cell][None])
                losses.append(puzzle.losses(guess, answers[offset + cell][None])[0])
        offset += count
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", PUZZLES)
def test_the_loss_and_its_gradient_are_those_of_the_slow_form(kind):
    name = {"codes": "image"}.get(kind, kind)
    net, batch = model(), random_batch(14)
    objective = Masked({name: PUZZLES[kind]()})
    rows = [row for row, has in enumerate(batch.present()) if name in has]
    loss = seeded(objective, net, net.encode(batch), batch)["loss"]
    loss.backward()
    got = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    riddle = seeded(objective._hide, net, net.encode(batch), batch, rows)[1][name]
    expected = slow_loss(net, objective, batch, name, riddle, rows)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert name == "text" or f"encoders.{name}.embedder.mask.vector" in got
    for n, p in net.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[n], p.grad, rtol=1e-3, atol=1e-5)


def test_several_are_guessed_in_one_pass_by_samples_that_have_what_is_needed():
    net, batch = model(), random_batch(14)
    puzzles = {"text": PUZZLES["text"](), "image": PUZZLES["image"]()}
    objective = Masked(puzzles, needs=["audio"])
    losses = seeded(objective, net, net.encode(batch), batch)
    rows = [row for row, has in enumerate(batch.present()) if len(has) == 3]
    riddles = seeded(objective._hide, net, net.encode(batch), batch, rows)[1]
    assert set(losses) == {"text", "image"}
    part = batch.select(rows)
    shown = part.inputs | {name: riddle.items for name, riddle in riddles.items()}
    tokens = net.fuse(net.encode(replace(part, inputs=shown)))
    assert tokens.num_samples == len(rows) == 2
    assert losses["text"].item() > 0 < losses["image"].item()
    assert len(riddles["image"].cells) == sum(max(1, round(0.4 * n)) if n > 1 else 0 for n in riddles["image"].counts)


def test_samples_with_what_must_be_lacking_do_not_count():
    net, batch = model(), random_batch(14)
    alone = Masked({"text": PUZZLES["text"]()}, source="text", lacks=["image", "audio"])
    rows = [row for row, has in enumerate(batch.present()) if has == {"text"}]
    loss = seeded(alone, net, net.encode(batch), batch)["loss"]
    part = batch.select(rows)
    torch.testing.assert_close(loss, seeded(alone, net, net.encode(part), part)["loss"])
    pictures = batch.only(["image"])
    assert alone(net, net.encode(pictures), pictures) == {}


class Sees(Objective):
    """Says what an objective beside is shown."""

    def forward(self, model, encoded, batch):
        tokens = encoded["text"]
        return {"loss": tokens.x.sum(), "more": model.fuse(encoded).x.sum()}


def test_an_objective_beside_sees_the_samples_with_parts_hidden():
    net, batch = model(), random_batch(14)
    objective = Masked({"text": PUZZLES["text"]()}, needs=["image"], beside={"match": Sees()})
    losses = seeded(objective, net, net.encode(batch), batch)
    rows = [row for row, has in enumerate(batch.present()) if {"text", "image"} <= has]
    shown, _ = seeded(objective._hide, net, net.encode(batch), batch, rows)
    assert set(losses) == {"text", "match", "match_more"}
    torch.testing.assert_close(losses["match"], shown["text"].x.sum())
    assert not torch.equal(shown["text"].x, net.encode(batch.select(rows))["text"].x)


def test_a_true_codec_gives_the_ids_of_the_cells_that_are_hidden():
    from mmformer.codec import Codec, ConvolutionDecoder
    from mmformer.encoders import image_convolutions
    from mmformer.nn.quantize import VectorQuantizer

    codec = Codec(8, image_convolutions(8, [6, 6], 3), VectorQuantizer(8, 9), ConvolutionDecoder(8, 3, [6, 6]))
    net, batch = model(), random_batch(14)
    net.heads["codes"] = Head(24, 9)
    objective = Masked({"image": Codes("codes", Scattered(0.4), FrozenCodec(codec), (9,))})
    riddle = objective.puzzles["image"].hide(net.encoders["image"], batch.inputs["image"], None)
    assert torch.equal(riddle.answer, codec.encode(batch.inputs["image"]).values[riddle.cells])
    loss = objective(net, net.encode(batch), batch)["loss"]
    loss.backward()
    assert all(p.grad is None for p in codec.parameters())


def test_hidden_pixels_change_nothing_but_what_is_not_hidden_does():
    net, batch = model(), random_batch(14)
    items = batch.inputs["image"]
    riddle = seeded(PUZZLES["image"]().hide, net.encoders["image"], items, None)
    seen = net.encoders["image"](riddle.items, len(batch)).x
    planes = [patches(group.float(), group.shape[1] // 4, group.shape[2] // 4) for group in items.groups()]
    cells = standardized(torch.cat([plane.flatten(0, 1) for plane in planes])[riddle.cells])
    torch.testing.assert_close(cells, riddle.answer, rtol=1e-3, atol=1e-3)  # the scale of the embedder is linear
    other = replace(riddle.items, values=255 - items.values)
    changed = (net.encoders["image"](other, len(batch)).x != seen).any(-1)[0]
    assert torch.equal(changed, ~torch.from_numpy(riddle.items.hidden))


def test_evaluation_hides_alike_and_its_meter_gives_mean_losses_and_accuracies():
    net, batch = model(), random_batch(14)
    objective = Masked({"text": PUZZLES["text"](), "image": PUZZLES["image"]()}).eval()
    encoded = net.encode(batch)
    with torch.no_grad():
        losses = objective(net, encoded, batch)
        found = objective.predict(net, encoded, batch)
    both = torch.tensor([{"text", "image"} <= has for has in batch.present()])
    assert (found["image_count"][~both] == 0).all()
    assert torch.equal(found["image_loss"].isnan(), found["image_count"] == 0)  # a lone patch is never hidden
    assert (found["image_count"] > 0).sum() == both.sum() - 1
    assert found["image_acc"].isnan().all()
    meter = objective.meter()
    for rows in ([0, 1, 2, 3], list(range(4, 14))):
        meter.update({name: value[rows] for name, value in found.items()}, batch.select(rows))
    result = meter.compute()
    assert set(result) == {"masked_text_loss", "masked_text_acc", "masked_image_loss"}
    assert result["masked_text_loss"] == pytest.approx(float(losses["text"]), rel=1e-5)
    assert result["masked_image_loss"] == pytest.approx(float(losses["image"]), rel=1e-5)


def test_half_precision_gives_about_the_same_loss():
    net, batch = model(), random_batch(14)
    objective = Masked({"image": PUZZLES["image"]()})
    exact = seeded(objective, net, net.encode(batch), batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = seeded(objective, net, net.encode(batch), batch)["loss"]
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)


def test_what_cannot_be_hidden_is_told():
    net, batch = model(), random_batch(14)
    net.encoders["image"].embedder.mask = None
    with pytest.raises(ValueError, match="nothing stands for them: give the embedder a mask vector"):
        Masked({"image": PUZZLES["image"]()})(net, net.encode(batch), batch)
    with pytest.raises(ValueError, match="the codec cuts these items into"):
        Codes("codes", Scattered(0.4), Grids(3), (7, 5)).hide(net.encoders["image"], batch.inputs["image"], None)
    with pytest.raises(TypeError, match="TextEmbedder cuts items into no cells"):
        Pixels("pixels", Scattered(0.4)).hide(net.encoders["text"], batch.inputs["image"], None)
    hidden = replace(batch.inputs["image"], hidden=np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match="it is said of 3 cells whether they are hidden"):
        net.encoders["image"](hidden, len(batch))
    with pytest.raises(ValueError, match="choose the samples first, then hide"):
        Batch(ids=batch.ids, inputs={"image": hidden}).select([0])


def test_patches_that_are_dropped_make_the_row_shorter_and_keep_their_places():
    tokens = packed_tokens({2: 9, 0: 5, 1: 1}, 3, 8)
    stage = PatchDropout(0.5, prefix=1)
    assert stage.eval()(tokens) is tokens
    fewer = stage.train()(tokens)
    assert fewer.layout.lengths == (5, 3, 1)
    assert fewer.layout.samples == tokens.layout.samples
    start = 0
    for part, length in zip(fewer.x[0].split([5, 3, 1]), (9, 5, 1), strict=True):
        whole = tokens.x[0, start : start + length]
        place = [int((whole == row).all(-1).nonzero()[0, 0]) for row in part]
        assert place[0] == 0
        assert place == sorted(set(place))
        start += length
    times = fewer.position[0, :, 0].split([5, 3, 1])
    assert all(torch.equal(time, time.sort().values) for time in times)
    assert F.one_hot(fewer.segment[0]).sum(0).tolist() == [5, 3, 1]


def test_words_of_a_long_vocabulary_are_scored_part_by_part(monkeypatch):
    from mmformer.objectives import language

    monkeypatch.setattr(language, "MANY_SCORES", 1)
    net, batch = model(), random_batch()
    objective = Masked({"text": Words("words", MASK, 50, SPECIAL, share=0.5)})
    found = []
    for many in (1, 2**24):
        monkeypatch.setattr(language, "MANY_SCORES", many)
        net.zero_grad()
        loss = seeded(objective, net, net.encode(batch), batch)["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
