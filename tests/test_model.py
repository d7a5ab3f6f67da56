"""Laws of the whole model: any subset, no influence between samples, packed as padded."""

import pytest
import torch

from mmformer.fusion import Fusion
from mmformer.model import Encoded, Model
from mmformer.nn import Transformer
from mmformer.pooling import ConcatenationPool, LowRankPool, MeanPool, mean_by_sample
from mmformer.tokens import to_padded
from mmformer.visibility import Visibility
from tests.helpers import SUBSETS, packed_tokens, random_batch, scramble, small_model

MODELS = {
    "concatenation": lambda: small_model(),
    "cross": lambda: small_model("cross"),
    "perceiver": lambda: small_model("perceiver"),
    "bottleneck": lambda: small_model(
        stream=["image", "latent", "audio", "text"],
        num_latents=2,
        visibility=Visibility(sees={m: [m, "latent"] for m in ("image", "audio", "text")}),
    ),
    "causal": lambda: small_model(
        stream=["image", "audio", "text", "latent"], sequential=True, visibility=Visibility(causal=True)
    ),
}


def late(pool):
    model = small_model()
    fusion = Fusion(24, ["image", "audio", "text", "latent"], None, pool, num_latents=1)
    return scramble(Model(dict(model.encoders), fusion, dict(model.heads)))


MODELS["late"] = lambda: late(ConcatenationPool(24, ["text", "image", "audio"]))
MODELS["low-rank"] = lambda: late(LowRankPool(24, ["text", "image", "audio"], rank=3))


def answers(model, batch):
    return model.output(model.encode(batch), "answer")[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_alone_gives_what_it_gives_in_a_mixed_batch(name):
    model, batch = MODELS[name](), random_batch(14)
    together = answers(model, batch)
    for row in range(len(batch)):
        torch.testing.assert_close(answers(model, batch.select([row]))[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_packed_is_padded_forward_and_backward(name):
    model, batch = MODELS[name](), random_batch(14)
    encoded = model.encode(batch)
    padded = Encoded({key: to_padded(tokens) for key, tokens in model.encode(batch).items()}, len(batch))
    results = []
    for form in (encoded, padded):
        out = model.output(form, "answer")[0]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((out * weight).sum(), list(model.parameters()), allow_unused=True)
        results.append((out, [g if g is not None else torch.zeros(1) for g in gradients]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_taking_modalities_away_is_never_having_had_them(subset):
    model = small_model()
    full = random_batch(4, subsets=[("text", "image", "audio")])
    encoded = model.encode(full).only(subset)
    torch.testing.assert_close(
        model.output(encoded, "answer")[0], answers(model, full.only(subset)), rtol=1e-5, atol=1e-5
    )


def test_every_parameter_of_a_full_model_gets_a_gradient():
    for name in MODELS:
        model = MODELS[name]()
        answers(model, random_batch(14)).square().sum().backward()
        missing = [key for key, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
        # an attention's key bias shifts all scores of a query alike, and one latent alone mixes nothing
        assert not [key for key in missing if not key.startswith("fusion.latents")], name


def test_pictures_of_any_size_are_patches_as_a_convolution_makes_them():
    from torch import nn

    from mmformer.batch import Ragged
    from mmformer.encoders import image_patches

    embedder = scramble(image_patches(8, 4, 3, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4]))
    convolution = nn.Conv2d(3, 8, 4, 4)
    with torch.no_grad():
        convolution.weight.copy_(embedder.stem.linear.weight.view(8, 4, 4, 3).permute(0, 3, 1, 2))
        convolution.bias.copy_(embedder.stem.linear.bias)
    pictures = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8) for h, w in ((8, 12), (4, 4), (12, 8))]
    tokens = embedder(Ragged.stack(pictures, [0, 1, 2], 1), 3)
    for row, picture in enumerate(pictures):
        planes = (picture / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
        expected = convolution(planes.permute(2, 0, 1)[None]).flatten(2)[0].T
        mine = tokens.sample()[0] == row
        torch.testing.assert_close(tokens.x[0][mine], expected, rtol=1e-4, atol=1e-4)
        columns = picture.shape[1] // 4
        assert tokens.position[0][mine].tolist() == [[0, i // columns, i % columns] for i in range(mine.sum())]


@pytest.mark.parametrize("padded", [False, True])
def test_the_mean_of_a_sample_is_the_mean_of_its_tokens(padded):
    tokens = packed_tokens({2: 3, 0: 1}, 3, 5)
    mean, present = mean_by_sample(to_padded(tokens) if padded else tokens)
    assert present.tolist() == [True, False, True]
    for sample in (0, 2):
        torch.testing.assert_close(mean[sample], tokens.x[0][tokens.sample()[0] == sample].mean(0))
    assert mean[1].abs().sum() == 0


def test_low_rank_fusion_is_the_outer_product_it_factorises():
    pool = scramble(LowRankPool(3, ["text", "image"], rank=2))
    text, image = packed_tokens({0: 1}, 1, 3, "text", 1), packed_tokens({0: 1}, 1, 3, "image", 2)
    from mmformer.tokens import merge

    one = [torch.cat([t.x[0, 0], torch.ones(1)]) for t in (text, image)]
    outer = torch.outer(*one)
    weights = [torch.cat([f.weight.view(2, 3, 3), f.bias.view(2, 3, 1)], -1) for f in pool.factors]
    tensor = torch.einsum("r,roi,roj->oij", pool.weights, *weights)
    expected = torch.einsum("oij,ij->o", tensor, outer) + pool.bias
    torch.testing.assert_close(pool(merge([text, image]))[0], expected, rtol=1e-4, atol=1e-5)


def test_errors_say_what_is_there():
    model = small_model()
    with pytest.raises(KeyError, match="no head 'caption': this model has"):
        model.output(model.encode(random_batch(3)), "caption")
    with pytest.raises(ValueError, match=r"fusion reads \['text'\] but the encoders are"):
        Model({k: v for k, v in model.encoders.items() if k != "text"}, model.fusion)
    with pytest.raises(ValueError, match="name 'latent'"):
        Fusion(8, ["text"], None, MeanPool(), num_latents=2)
    with pytest.raises(ValueError, match=r"the stream is \['text'\]"):
        Fusion(24, ["text"], Transformer(24, 0, []), MeanPool())(model.encode(random_batch(2, subsets=[("image",)])), 2)


def test_frozen_parameters_are_named_and_stay():
    model = small_model()
    frozen = model.freeze(["encoders.image.*"])
    assert frozen
    assert all(name.startswith("encoders.image.") for name in frozen)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(frozen)
    with pytest.raises(ValueError, match=r"'encoders.video.\*' matches no parameter"):
        model.freeze(["encoders.video.*"])
