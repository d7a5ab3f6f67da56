"""Parts that are one: the same numbers as copies of them, the sum of their gradients, and parameters counted once."""

from functools import partial

import pytest
import torch

from mmformer.batch import Ragged
from mmformer.checkpoints import build, load_model, save_model
from mmformer.encoders import Encoder, TextEmbedder, image_patches, mel_patches
from mmformer.fusion import Fusion
from mmformer.heads import Head, VocabularyHead
from mmformer.model import Model
from mmformer.nn import Attention, Block, LearnedGrid, Sinusoid, Transformer
from mmformer.pooling import MeanPool
from mmformer.run.summary import parameters_line
from tests.helpers import random_batch, scramble

LAYER = partial(Block, attention=partial(Attention, num_heads=3))
TRUNK = {f"encoders.{name}.stages.0": "fusion.transformer" for name in ("text", "image", "audio")}


def model(shared=None):
    grid = partial(LearnedGrid, num_positions=8)
    embedders = {
        "text": TextEmbedder(24, 50, Sinusoid),
        "image": image_patches(24, 4, 3, grid),
        "audio": mel_patches(24, 5, 4, Sinusoid),
    }
    encoders = {name: Encoder(part, [Transformer(24, 2, [LAYER])]) for name, part in embedders.items()}
    fusion = Fusion(24, ["text", "image", "audio"], Transformer(24, 2, [LAYER]), MeanPool())
    return Model(encoders, fusion, {"answer": Head(24, 7)}, shared=shared)


def answers(net, batch):
    return net.output(net.encode(batch), "answer")[0]


def test_a_shared_trunk_computes_what_copies_do_and_gathers_their_gradients():
    one, copies, batch = scramble(model(TRUNK)), model(), random_batch()
    copies.load_state_dict(one.state_dict())
    ours, theirs = answers(one, batch), answers(copies, batch)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, parameter in one.fusion.transformer.named_parameters():
        places = ["fusion.transformer", *TRUNK]
        parts = [copies.get_parameter(f"{place}.{name}").grad for place in places]
        torch.testing.assert_close(parameter.grad, torch.stack(parts).sum(0), rtol=1e-4, atol=1e-4)


def test_shared_parameters_count_once():
    one, copies = model(TRUNK), model()
    trunk = sum(p.numel() for p in one.fusion.transformer.parameters())
    assert sum(p.numel() for p in copies.parameters()) - sum(p.numel() for p in one.parameters()) == 3 * trunk
    line = parameters_line(one)
    assert f"shared {trunk / 1e6:.2f}" in line
    assert line.startswith(f"model: {sum(p.numel() for p in one.parameters()) / 1e6:.2f} M")


def test_a_shared_trunk_is_saved_once_and_comes_back_as_one(tmp_path):
    block = {"_target_": "mmformer.nn.Block", "_partial_": True,
             "attention": {"_target_": "mmformer.nn.Attention", "_partial_": True, "num_heads": 2}}  # fmt: skip
    stage = {"_target_": "mmformer.nn.Transformer", "dim": 8, "depth": 1, "layers": [block]}
    encoders = {
        name: {"_target_": "mmformer.encoders.Encoder", "stages": [stage],
               "embedder": {"_target_": "mmformer.encoders.TextEmbedder", "dim": 8, "vocab_size": size}}
        for name, size in (("text", 5), ("code", 6))
    }  # fmt: skip
    config = {
        "_target_": "mmformer.model.Model", "encoders": encoders, "heads": {},
        "shared": {"encoders.code.stages.0.layers.0": "encoders.text.stages.0.layers.0"},
    }  # fmt: skip
    made = scramble(build(config))
    found = load_model(save_model(tmp_path / "model", made, {"model": config})).model
    layers = [found.get_submodule(f"encoders.{name}.stages.0.layers.0") for name in ("text", "code")]
    assert layers[0] is layers[1]
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), found.parameters(), strict=True))


def test_parts_that_are_not_there_or_not_alike_are_refused():
    with pytest.raises(ValueError, match=r"'encoders.video'.*no such part"):
        model({"encoders.video": "fusion"})
    with pytest.raises(ValueError, match=r"heads.answer and fusion.transformer differ"):
        model({"heads.answer": "fusion.transformer"})


def test_a_factorised_table_is_the_product_of_its_two():
    narrow, wide = scramble(TextEmbedder(12, 50, Sinusoid, table_dim=3)), TextEmbedder(12, 50, Sinusoid)
    with torch.no_grad():
        wide.table.weight.copy_(narrow.table.weight @ narrow.widen.weight.T)
    ids = Ragged.stack([torch.tensor([3, 1, 4]), torch.tensor([49])], [0, 2], 0)
    torch.testing.assert_close(narrow(ids, 3).x, wide(ids, 3).x)
    assert sum(p.numel() for p in narrow.parameters()) == 50 * 3 + 3 * 12


def test_a_head_is_tied_to_a_factorised_table_behind_a_map_to_its_width():
    encoders = {"text": Encoder(TextEmbedder(12, 50, table_dim=3))}
    tied = VocabularyHead(3, 50, transform=torch.nn.Linear(12, 3), tied="text")
    made = Model(encoders, heads={"words": tied})
    assert made.heads["words"].out.weight is made.encoders["text"].embedder.table.weight
    assert made.heads["words"](torch.randn(4, 12)).shape == (4, 50)
    with pytest.raises(ValueError, match=r"scores \(50, 12\) and is tied to a table of \(50, 3\)"):
        Model(encoders, heads={"words": VocabularyHead(12, 50, tied="text")})
