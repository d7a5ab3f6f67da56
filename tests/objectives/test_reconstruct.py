"""The objective of codecs and its meter, and that a codec trains, comes back and goes on bit for bit."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial

import pytest
import torch

from mmformer.batch import Batch, Ragged
from mmformer.checkpoints import build, load_model, save_model
from mmformer.codec import Codec
from mmformer.model import Model
from mmformer.nn import FSQ, ResidualVQ, VectorQuantizer
from mmformer.objectives import Reconstruct
from tests.helpers import random_batch, small_model
from tests.test_codec import DIM, picture_codec, sound_codec


def pictures_batch(seed: int = 0) -> Batch:
    """Samples with and without a picture; one has two."""
    batch = random_batch(7, seed)
    items = [*batch.inputs["image"].items()]
    twice = Ragged.stack([item for _, item in items] + [items[0][1]], [row for row, _ in items] + [items[-1][0]], 1)
    return Batch(ids=batch.ids, inputs={**batch.inputs, "image": twice}, targets=batch.targets)


def codec_model(**encoders) -> Model:
    return Model(encoders or {"image": picture_codec()})


def codec_of(model: Model) -> Codec:
    codec = model.encoders["image"]
    assert isinstance(codec, Codec)
    return codec


def test_the_loss_is_the_mean_square_on_the_networks_scale():
    model, batch, objective = codec_model(), pictures_batch(), Reconstruct("image")
    codec, encoded = codec_of(model), model.encode(batch)
    losses = objective(model, encoded, batch)
    assert set(losses) == {"loss"}
    squares = []
    for row, item in batch.inputs["image"].items():
        alone = Ragged.stack([item], [row], 1)
        made, _ = codec.reconstruct(codec(alone, 7), alone)
        squares.append((made.values - (item.flatten(0, 1) / 255 - 0.5) / 0.25).square().flatten())
    torch.testing.assert_close(losses["loss"], torch.cat(squares).mean())


def test_a_quantizer_that_asks_for_it_adds_its_commitment():
    model = codec_model(image=picture_codec(VectorQuantizer(DIM, 9)))
    batch = pictures_batch()
    losses = Reconstruct("image")(model, model.encode(batch), batch)
    assert set(losses) == {"loss", "commitment"}
    assert losses["commitment"].requires_grad


def test_errors_and_ids_are_of_each_sample():
    model, batch, objective = codec_model().eval(), pictures_batch(), Reconstruct("image")
    found = objective.predict(model, model.encode(batch), batch)
    codec = codec_of(model)
    own: dict[int, list] = {}
    for row, item in batch.inputs["image"].items():
        own.setdefault(row, []).append(item)
    for row in range(len(batch)):
        if row not in own:
            assert found["error"][row].isnan()
            assert (found["codes"][row] == -1).all()
            continue
        items = Ragged.stack(own[row], [0] * len(own[row]), 1)
        codes = codec.encode(items)
        back = codec.decode(codes, items)
        wanted = (back.values.float() - items.values.float()).square().mean()
        torch.testing.assert_close(found["error"][row], wanted, rtol=1e-3, atol=0.0)
        ids = found["codes"][row]
        assert torch.equal(ids[ids[:, 0] >= 0].sort(0).values, codes.values.sort(0).values)


def test_nothing_to_reconstruct_is_no_loss():
    model, batch = codec_model(), random_batch(4, subsets=[("text",)])
    encoded = model.encode(batch)
    assert Reconstruct("image")(model, encoded, batch) == {}
    assert Reconstruct("image").predict(model, encoded, batch) == {}
    assert Reconstruct("image").meter().compute() == {}


def test_an_encoder_that_is_no_codec_is_refused():
    model, batch = small_model(), random_batch(7)
    with pytest.raises(TypeError, match=r"encoder 'image' is a Encoder: .* mmformer.codec.Codec"):
        Reconstruct("image")(model, model.encode(batch), batch)


def test_the_meter_counts():
    meter, batch = Reconstruct("image").meter(), random_batch(3)
    codes = torch.tensor([[[0, 1], [0, 2]], [[1, 1], [-1, -1]], [[-1, -1], [-1, -1]]])
    sizes, nan = torch.tensor([[4, 8]] * 3), torch.nan
    meter.update(
        {"error": torch.tensor([100.0, 300.0, nan]), "codes": codes, "sizes": sizes, "peak": torch.full((3,), 255.0)},
        batch,
    )
    found = meter.compute()
    entropy = [math.log(3) - 2 / 3 * math.log(2)] * 2  # 2 + 1 of three in both codebooks
    assert found == pytest.approx(
        {
            "mse": 200.0,
            "psnr": 10 * math.log10(255**2 / 200),
            "codes_used": (2 / 4 + 2 / 8) / 2,
            "perplexity": sum(math.exp(e) for e in entropy) / 2,
            "bits": (2 + 1) * (2 + 3) / 2,
        }
    )
    meter.update(
        {"error": torch.full((3,), nan), "codes": codes[2:].expand(3, -1, -1), "sizes": sizes,
         "peak": torch.full((3,), 255.0)}, batch,
    )  # fmt: skip
    assert meter.compute() == found


def test_a_sound_has_no_psnr():
    batch = Batch(ids=("a",), inputs={"audio": Ragged.stack([torch.randn(8, 10)], [0], 1)})
    model, objective = codec_model(audio=sound_codec()), Reconstruct("audio")
    meter = objective.meter()
    with torch.inference_mode():
        meter.update(objective.predict(model, model.encode(batch), batch), batch)
    assert set(meter.compute()) == {"mse", "codes_used", "perplexity", "bits"}


# ------------------------------------------------------------------ training


def steps(model: Model, optimizer: torch.optim.Optimizer, numbers) -> None:
    objective = Reconstruct("image")
    for number in numbers:
        torch.manual_seed(number)  # as `Training` does: randomness is a function of the step
        batch = pictures_batch(number)
        losses = objective(model.train(), model.encode(batch), batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("quantizer", [FSQ, VectorQuantizer, ResidualVQ])
def test_a_resumed_codec_goes_on_bit_for_bit(quantizer):
    made = {
        FSQ: lambda: FSQ([5, 4, 3]),
        VectorQuantizer: lambda: VectorQuantizer(DIM, 20),
        ResidualVQ: lambda: ResidualVQ(2, partial(VectorQuantizer, DIM, 8)),
    }[quantizer]

    def fresh():
        model = codec_model(image=picture_codec(made()))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    torch.manual_seed(0)
    whole, optimizer = fresh()
    steps(whole, optimizer, range(3))
    saved = deepcopy([whole.state_dict(), optimizer.state_dict()])
    torch.manual_seed(99)
    resumed, other = fresh()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    steps(whole, optimizer, range(3, 6))
    steps(resumed, other, range(3, 6))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_saved_codec_comes_back_with_its_codebook(tmp_path):
    config = {
        "_target_": "mmformer.model.Model",
        "encoders": {
            "image": {
                "_target_": "mmformer.codec.Codec",
                "dim": 8,
                "encoder": {"_target_": "mmformer.encoders.image_convolutions", "dim": 8, "widths": [4], "channels": 3},
                "quantizer": {
                    "_target_": "mmformer.nn.ResidualVQ",
                    "num_stages": 2,
                    "stage": {"_target_": "mmformer.nn.VectorQuantizer", "_partial_": True, "dim": 8, "size": 16},
                },
                "decoder": {"_target_": "mmformer.codec.ConvolutionDecoder", "dim": 8, "widths": [4], "channels": 3},
            }
        },
    }
    model, batch = build(config), pictures_batch()
    objective = Reconstruct("image")
    objective(model.train(), model.encode(batch), batch)  # the codebook moves
    objectives = {"reconstruct": {"_target_": "mmformer.objectives.Reconstruct", "source": "image"}}
    save_model(
        tmp_path / "model", model, {"model": config, "objectives": objectives}, objectives={"reconstruct": objective}
    )
    here, back, items = codec_of(model.eval()), codec_of(load_model(tmp_path / "model").model), batch.inputs["image"]
    codes = here.encode(items)
    assert torch.equal(back.encode(items).values, codes.values)
    assert torch.equal(back.decode(codes, items).values, here.decode(codes, items).values)
