"""How far from the top each parameter lies, written out by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from mmformer.encoders import Encoder, Projection, TextEmbedder, image_patches
from mmformer.fusion import Fusion
from mmformer.heads import Head, VocabularyHead
from mmformer.model import Model
from mmformer.nn import Attention, Block, LearnedGrid, Transformer
from mmformer.pooling import MeanPool
from mmformer.training.layer_decay import distances
from mmformer.training.optim import adamw, describe_groups

DIM = 8
LAYER = partial(Block, attention=partial(Attention, num_heads=2))


def stack(depth: int) -> Transformer:
    return Transformer(DIM, depth, [LAYER])


def model(fusion: bool = True) -> Model:
    """Text with 1 layer, pictures with 3 and a projection, a fusion of 2."""
    pictures = image_patches(DIM, 4, 3, partial(LearnedGrid, num_positions=90))
    encoders = {
        "text": Encoder(TextEmbedder(DIM, 5), [stack(1)]),
        "image": Encoder(pictures, [stack(3), Projection(8, 8)]),
    }
    part = Fusion(DIM, ["latent", "text", "image"], stack(2), MeanPool(["latent"]), num_latents=1) if fusion else None
    return Model(encoders, part, {"answer": Head(DIM, 3)})


FUSED = {
    "heads.answer": 0,
    "fusion.transformer.norm": 0,
    "fusion.transformer.layers.1": 1,
    "fusion.transformer.layers.0": 2,
    "fusion.latents": 3,
    "fusion.entrances": 3,
    "encoders.text.stages.0.norm": 3,
    "encoders.text.stages.0.layers.0": 4,
    "encoders.text.embedder": 5,
    "encoders.image.stages.1": 3,
    "encoders.image.stages.0.norm": 3,
    "encoders.image.stages.0.layers.2": 4,
    "encoders.image.stages.0.layers.1": 5,
    "encoders.image.stages.0.layers.0": 6,
    "encoders.image.embedder": 7,
}
ALONE = {name: max(0, level - 3) for name, level in FUSED.items() if not name.startswith("fusion")}


@pytest.mark.parametrize(("fusion", "expected"), [(True, FUSED), (False, ALONE)])
def test_each_part_lies_below_what_reads_it(fusion, expected):
    whole = nn.ModuleDict({"model": model(fusion), "objectives": nn.ModuleDict({"x": nn.Linear(2, 2)})})
    found = distances(whole)
    seen = set()
    for name, parameter in whole.named_parameters():
        (part,) = [part for part in expected if name.startswith(f"model.{part}")] or [None]
        assert found[parameter] == expected.get(part, 0), name
        seen.add(part)
    assert seen == {*expected, None}


def test_a_tied_table_lies_at_its_lower_place():
    encoders = {"text": Encoder(TextEmbedder(DIM, 5), [stack(2)])}
    tied = Model(encoders, None, {"words": VocabularyHead(DIM, 5, tied="text")})
    found = distances(tied)
    assert found[tied.heads["words"].out.weight] == 3
    assert found[tied.heads["words"].out.bias] == 0


class Foreign(nn.Module):
    """A network of someone else, with the names of timm's vision Transformer."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.patch_embed = nn.Linear(4, DIM)
        self.convolutions = nn.ModuleList(nn.Conv1d(2, 2, 3) for _ in range(2))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(DIM, 20), nn.Linear(20, DIM)) for _ in range(3)))
        self.norm = nn.LayerNorm(DIM)


def test_layers_of_a_foreign_network_are_its_list_of_like_parts():
    foreign = Model({"image": Foreign()}, None, {"answer": Head(DIM, 3)})
    found = distances(foreign)
    by_name = {name: found[p] for name, p in foreign.named_parameters()}
    assert by_name["encoders.image.norm.weight"] == 0
    assert [by_name[f"encoders.image.blocks.{i}.0.weight"] for i in range(3)] == [3, 2, 1]
    assert {by_name[f"encoders.image.{n}"] for n in ("cls_token", "patch_embed.bias", "convolutions.1.weight")} == {4}


def test_rates_fall_by_layer_and_vectors_do_not_decay():
    whole = nn.ModuleDict({"model": model(), "objectives": nn.ModuleDict()})
    optimizer = adamw(whole, lr=0.1, weight_decay=0.5, betas=(0.9, 0.99), layer_decay=0.75)
    rate, decay = {}, {}
    names = {p: name.removeprefix("model.") for name, p in whole.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[parameter] not in rate
            rate[names[parameter]], decay[names[parameter]] = group["lr"], group["weight_decay"]
    assert len(rate) == len(names)
    for name, found in rate.items():
        (level,) = [level for part, level in FUSED.items() if name.startswith(part)]
        assert found == pytest.approx(0.1 * 0.75**level)
    assert decay["encoders.image.stages.0.layers.0.attention.qkv.weight"] == 0.5
    assert decay["encoders.image.stages.0.layers.0.attention.qkv.bias"] == 0
    assert decay["fusion.latents"] == decay["encoders.image.embedder.position.parts.0.table.weight"] == 0
    assert optimizer.param_groups[0]["lr"] == 0.1  # which is what is logged


def test_the_table_shows_rate_decay_size_and_parts():
    whole = nn.ModuleDict({"model": model(), "objectives": nn.ModuleDict()})
    optimizer = adamw(whole, lr=0.1, weight_decay=0.5, betas=(0.9, 0.99), layer_decay=0.5)
    header, *rows = describe_groups(optimizer, whole).splitlines()
    assert header.split() == ["lr", "decay", "parameters", "parts"]
    assert rows[0].split() == ["0.1", "0.5", "24", "heads.answer.out"]
    assert rows[2].split()[:2] == ["0.05", "0.5"]
    assert rows[2].endswith("fusion.transformer.layers.1")
    assert rows[-1].endswith("encoders.image.embedder")
    assert sum(int(row.split()[2].replace(",", "")) for row in rows) == sum(p.numel() for p in whole.parameters())


def test_rates_are_those_of_timm_for_a_vision_transformer():
    timm = pytest.importorskip("timm", reason="rates are compared with timm's: pip install mmformer[timm]")
    from timm.optim import param_groups_layer_decay

    sizes = {"embed_dim": 12, "depth": 3, "num_heads": 2, "img_size": 32, "num_classes": 5}
    theirs = timm.models.VisionTransformer(**sizes)
    scale = {p: g["lr_scale"] for g in param_groups_layer_decay(theirs, layer_decay=0.75) for p in g["params"]}
    head, theirs.head = theirs.head, nn.Identity()
    found = distances(Model({"image": theirs}, None, {"answer": head}))
    for parameter, level in found.items():
        if parameter in set(theirs.norm.parameters()):  # which timm counts with the last layer, and BEiT with the head
            assert (level, scale[parameter]) == (0, 0.75)
        else:
            assert scale[parameter] == pytest.approx(0.75**level)
    assert scale.keys() == found.keys()
