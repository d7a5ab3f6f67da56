import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mmformer.heads import UnitHead
from mmformer.model import Encoded, Model
from mmformer.nn import Attention, Block, Transformer
from mmformer.objectives import Contrastive, info_nce, sigmoid
from mmformer.objectives.contrastive import RetrievalMeter, Scale, retrieval_ranks
from tests.helpers import random_batch, scramble, small_model


def unit(rows, dim, seed):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_info_nce_is_the_loop_of_the_paper():
    a, b, scale = unit(5, 8, 0), unit(5, 8, 1), torch.tensor(7.0)
    total = 0.0
    for i in range(5):
        scores = [math.exp(scale * float(a[i] @ b[j])) for j in range(5)]
        back = [math.exp(scale * float(a[j] @ b[i])) for j in range(5)]
        total -= math.log(scores[i] / sum(scores)) + math.log(back[i] / sum(back))
    assert float(info_nce(a, b, scale, torch.tensor(0.0))) == pytest.approx(total / 10, rel=1e-5)


def test_sigmoid_is_the_loop_of_the_paper():
    a, b, scale, bias = unit(5, 8, 0), unit(5, 8, 1), torch.tensor(7.0), torch.tensor(-3.0)
    total = 0.0
    for i in range(5):
        for j in range(5):
            z = 1 if i == j else -1
            total += math.log(1 + math.exp(-z * (float(scale) * float(a[i] @ b[j]) + float(bias))))
    assert float(sigmoid(a, b, scale, bias)) == pytest.approx(total / 5, rel=1e-5)


def tri_modal():
    model = small_model()
    heads = {name: UnitHead(24, 6) for name in ("text", "image", "audio")}
    return scramble(Model(dict(model.encoders), None, heads))


def test_every_pair_counts_over_the_samples_that_have_both():
    model, batch = tri_modal(), random_batch(21)
    objective = Contrastive(["text", "image", "audio"], info_nce, scale=10.0)
    encoded = model.encode(batch)
    losses = objective(model, encoded, batch)
    assert set(losses) == {"text_image", "text_audio", "image_audio"}
    both = sorted(set(batch.inputs["text"].rows) & set(batch.inputs["audio"].rows))
    text, audio = (model.output(encoded, name, name)[0][both] for name in ("text", "audio"))
    expected = info_nce(text, audio, objective.log_scale.exp(), objective.bias) / 3
    torch.testing.assert_close(losses["text_audio"], expected)


def test_a_batch_without_pairs_has_no_loss():
    model, batch = tri_modal(), random_batch(6, subsets=[("text",), ("image",)])
    assert Contrastive(["text", "image"], info_nce, 10.0)(model, model.encode(batch), batch) == {}


def test_an_anchor_leaves_only_its_pairs_and_pairs_have_scales_of_their_own():
    model, batch = tri_modal(), random_batch(21)
    scales = {"text_image": Scale(20.0, learned=False), "image_audio": Scale([5.0, 200.0])}
    objective = Contrastive(["text", "image", "audio"], info_nce, 10.0, anchor="image", scales=scales)
    encoded = model.encode(batch)
    losses = objective(model, encoded, batch)
    assert set(losses) == {"text_image", "image_audio"}
    both = sorted(set(batch.inputs["image"].rows) & set(batch.inputs["audio"].rows))
    image, audio = (model.output(encoded, name, name)[0][both] for name in ("image", "audio"))
    expected = info_nce(image, audio, torch.tensor([5.0, 100.0])) / 2  # a scale goes up to 100
    torch.testing.assert_close(losses["image_audio"], expected)
    sum(losses.values()).backward()
    assert objective.scales["text_image"].log.grad is None
    assert objective.scales["image_audio"].log.grad.shape == (2,)


def test_samples_of_one_class_are_no_negatives_and_those_without_one_are():
    model, batch = tri_modal(), random_batch(12, subsets=[("text", "image")])
    label = torch.tensor([1, 1, 2, -100, -100, 3, 4, 2, 5, 6, 7, 1])
    batch = replace(batch, targets={"group": label})
    encoded = model.encode(batch)
    found = Contrastive(["text", "image"], info_nce, 10.0, same="group")(model, encoded, batch)["text_image"]
    text, image = (model.output(encoded, name, name)[0] for name in ("text", "image"))
    ids = torch.where(label < 0, 100 + torch.arange(12), label)
    torch.testing.assert_close(found, info_nce(text, image, torch.tensor(10.0), ids=ids))
    assert not torch.isclose(found, info_nce(text, image, torch.tensor(10.0)))


def with_dropout(dropout):
    layer = partial(Block, attention=partial(Attention, num_heads=3), dropout=dropout)
    encoders = dict(tri_modal().encoders)
    encoders["text"].stages.append(Transformer(24, 1, [layer]))
    heads = {name: UnitHead(24, 6) for name in encoders}
    return scramble(Model(encoders, None, heads))


def gradients(model, objective, encoded, batch):
    torch.manual_seed(3)
    losses = objective(model, encoded, batch)
    parameters = [*model.parameters(), objective.log_scale]
    return losses, torch.autograd.grad(sum(losses.values()), parameters)


def test_a_batch_in_chunks_has_the_gradients_of_the_whole():
    model, batch, names = with_dropout(0.0), random_batch(17), ["text", "image", "audio"]
    loss, expected = gradients(model, Contrastive(names, info_nce, 10.0), model.encode(batch), batch)
    chunked = Contrastive(names, info_nce, 10.0, chunk=2)  # some chunks lack a modality
    assert not chunked.needs_encoded
    found, slopes = gradients(model, chunked, Encoded({}, 17), batch)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    for slope, wanted in zip(slopes, expected, strict=True):
        assert (slope - wanted).norm() <= 1e-5 * wanted.norm()


def test_the_second_pass_over_a_chunk_draws_the_same_dropout(monkeypatch):
    model, batch = with_dropout(0.4).train(), random_batch(12)
    objective = Contrastive(["text", "image", "audio"], info_nce, 10.0, chunk=5)
    loss, slopes = gradients(model, objective, Encoded({}, 12), batch)
    monkeypatch.setattr("mmformer.objectives.contrastive.checkpoint", lambda part, *inputs, **options: part(*inputs))
    kept, expected = gradients(model, objective, Encoded({}, 12), batch)
    torch.testing.assert_close(loss, kept)
    torch.testing.assert_close(slopes, expected)
    model.eval()
    assert not torch.isclose(gradients(model, objective, Encoded({}, 12), batch)[0]["text_image"], kept["text_image"])


def test_chunks_keep_nothing_of_the_encoders_for_the_backward_pass():
    model, batch = with_dropout(0.0), random_batch(40, subsets=[("text", "image")])

    def kept(chunk):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        objective = Contrastive(["text", "image"], info_nce, 10.0, chunk=chunk)
        encoded = model.encode(batch) if chunk is None else Encoded({}, 40)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            objective(model, encoded, batch)
        return total

    assert kept(4) < kept(None) / 10


def test_what_is_encoded_already_is_not_encoded_again():
    model, batch = tri_modal(), random_batch(12)
    encoded = model.encode(batch)
    model.encode = lambda batch: pytest.fail("encoded twice")
    assert Contrastive(["text", "image"], info_nce, 10.0, chunk=2)(model, encoded, batch)


def test_recall_is_counted_slowly_the_same_with_ties_as_halves():
    meter = RetrievalMeter(["text", "image"], chunk=3)
    batch = random_batch(8)
    text, image = unit(8, 2, 0).round(decimals=1), unit(8, 2, 1).round(decimals=1)
    image[5] = image[4]
    text[7] = torch.nan
    meter.update({"text": text, "image": image}, batch)
    got = meter.compute()
    ranks = []
    for i in range(7):
        own = float(text[i] @ image[i])
        scores = [float(text[i] @ image[j]) for j in range(7)]
        ranks.append(1 + sum(s > own + 1e-7 for s in scores) + (sum(abs(s - own) <= 1e-7 for s in scores) - 1) / 2)
    assert got["t2i_median_rank"] == sorted(ranks)[3]
    assert got["t2i_r@1"] == pytest.approx(sum(r <= 1 for r in ranks) / 7)
    assert got["i2t_r@10"] == 1.0


def test_the_means_are_over_all_directions():
    meter = RetrievalMeter(["audio", "text", "image"])
    batch = random_batch(30)
    meter.update({name: unit(30, 4, seed) for seed, name in enumerate(["text", "image", "audio"])}, batch)
    got = meter.compute()
    directions = [a + "2" + b for a in "tia" for b in "tia" if a != b]
    for k in (1, 5, 10):
        assert got[f"r@{k}"] == pytest.approx(sum(got[f"{d}_r@{k}"] for d in directions) / 6)
    assert got["mean_recall"] == pytest.approx(sum(got[f"r@{k}"] for k in (1, 5, 10)) / 3)
    assert Contrastive.headline == ("mean_recall", "max")


def test_a_model_that_says_the_same_of_everything_is_judged_as_chance():
    same = unit(1, 4, 0).expand(40, 4)
    assert retrieval_ranks(same, same, chunk=7).tolist() == [20.5] * 40
    perfect = torch.eye(9)
    assert retrieval_ranks(perfect, perfect).tolist() == [1.0] * 9


def test_modalities_that_begin_alike_have_directions_of_their_own():
    meter = RetrievalMeter(["audio", "accelerometer"])
    meter.update({"audio": unit(6, 4, 0), "accelerometer": unit(6, 4, 1)}, random_batch(6))
    assert {"a2c_r@1", "c2a_r@1"} <= set(meter.compute())


def test_nothing_is_measured_without_a_pair():
    meter = RetrievalMeter(["text", "image"])
    assert meter.compute() == {}
    meter.update({"text": unit(6, 4, 0)}, random_batch(6, subsets=[("text",)]))
    meter.update({"image": unit(6, 4, 1)}, random_batch(6, subsets=[("image",)]))
    assert meter.compute() == {}


def test_one_modality_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        Contrastive(["text"], info_nce, 10.0)


def test_what_is_no_pair_is_refused():
    with pytest.raises(ValueError, match=r"anchor 'smell' is none of the modalities"):
        Contrastive(["text", "image"], info_nce, 10.0, anchor="smell")
    with pytest.raises(ValueError, match=r"scales of \['image_text'\], but the pairs are \['text_image'\]"):
        Contrastive(["text", "image"], info_nce, 10.0, scales={"image_text": Scale(1.0)})
