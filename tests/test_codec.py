"""A codec: ids of items and items of ids, of any size, and no item depends on another."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from mmformer.batch import Ragged
from mmformer.codec import Codec, ConvolutionDecoder, FrozenCodec, mel_decoder
from mmformer.encoders import ClassTokens, CodeEmbedder, Encoder, image_convolutions, image_patches, mel_convolutions
from mmformer.nn import FSQ, Quantizer, ResidualVQ, VectorQuantizer
from tests.helpers import random_batch, scramble

DIM = 12
QUANTIZERS = {
    "fsq": partial(FSQ, [5, 4, 3]),
    "vq": partial(VectorQuantizer, DIM, 20),
    "residual_vq": partial(ResidualVQ, 3, partial(VectorQuantizer, DIM, 8)),
}


def picture_codec(quantizer: Quantizer | None = None) -> Codec:
    encoder, decoder = image_convolutions(DIM, [6, 8], 3), ConvolutionDecoder(DIM, 3, [6, 8])
    codec = Codec(DIM, encoder, quantizer or FSQ([5, 4, 3]), decoder)
    scramble(codec)
    return codec


def sound_codec(quantizer: Quantizer | None = None) -> Codec:
    codec = Codec(DIM, mel_convolutions(DIM, 10, [6, 8]), quantizer or FSQ([5, 4, 3]), mel_decoder(DIM, 10, [6, 8]))
    scramble(codec)
    return codec


def pictures(*sizes: tuple[int, int]) -> Ragged:
    draw = torch.Generator().manual_seed(0)
    items = [torch.randint(0, 256, (*size, 3), generator=draw, dtype=torch.uint8) for size in sizes]
    return Ragged.stack(items, range(len(items)), 1)


def sounds(*frames: int) -> Ragged:
    draw = torch.Generator().manual_seed(0)
    return Ragged.stack([torch.randn(n, 10, generator=draw) for n in frames], range(len(frames)), 1)


CASES = [
    pytest.param(picture_codec, pictures((8, 8), (7, 13), (8, 8), (16, 4), (9, 9)), id="pictures"),
    pytest.param(sound_codec, sounds(8, 5, 12, 8, 9), id="sounds"),
]


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(("make", "items"), CASES)
def test_an_item_depends_on_no_other(make, items, name):
    codec = make(QUANTIZERS[name]()).eval()
    codes = codec.encode(items)
    pairs = zip(codes.items(), codec.decode(codes, items).items(), strict=True)
    whole = {row: (ids, item) for (row, ids), (_, item) in pairs}
    for row, item in items.items():
        alone = Ragged.stack([item], [0], 1)
        ids = codec.encode(alone)
        ((_, grid),), ((_, back),) = ids.items(), codec.decode(ids, alone).items()
        assert torch.equal(grid, whole[row][0])
        # A grey level may round the other way: sums of another batch size are taken in another order.
        torch.testing.assert_close(back.float(), whole[row][1].float(), atol=1.0 if codec.pictures else 1e-5, rtol=0)
        assert back.shape == item.shape
        assert back.dtype == item.dtype


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(("make", "items"), CASES)
def test_what_is_decoded_is_what_training_reconstructs(make, items, name):
    codec = make(QUANTIZERS[name]()).eval()
    made, quantized = codec.reconstruct(codec(items, 5), items)
    codes = codec.encode(items)
    assert torch.equal(quantized.ids, codes.values)
    assert codes.values.shape[1] == len(codec.quantizer.sizes)
    back = codec.decode(codes, items)
    assert (back.shapes, back.rows) == (items.shapes, items.rows)
    torch.testing.assert_close(back.values, codec.items(made).values)
    torch.testing.assert_close(codec.items(codec.normalize(items)).values, items.values)


def test_without_its_items_a_grid_becomes_whole_cells():
    codec, items = picture_codec(), pictures((7, 13), (8, 8))
    codes = codec.encode(items)
    assert dict(codes.items()).keys() == {0, 1}
    assert sorted(codes.shapes) == [(2, 2), (2, 4)]
    whole = codec.decode(codes)
    assert sorted(whole.shapes) == [(8, 8), (8, 16)]
    for (_, cut), (_, full) in zip(codec.decode(codes, items).items(), whole.items(), strict=True):
        assert torch.equal(cut, full[: cut.shape[0], : cut.shape[1]])
    assert sound_codec().decode(sound_codec().encode(sounds(5))).values.shape == (8, 12)


def test_ids_of_other_items_are_refused():
    codec = picture_codec()
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(4, 4\)"):
        codec.decode(codec.encode(pictures((8, 8))), pictures((16, 16)))
    with pytest.raises(ValueError, match=r"pictures .* or log-mel"):
        codec.encode(replace(sounds(8), values=torch.randn(80), shapes=((80,),)))


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"makes 4 x 4 of 2 x 2 cells, of which the encoder makes \(1, 1\)"):
        Codec(DIM, image_convolutions(DIM, [6, 8], 3), FSQ([5]), ConvolutionDecoder(DIM, 3, [6]))
    encoder = image_patches(DIM, 4, 3, class_tokens=partial(ClassTokens, count=1))
    with pytest.raises(ValueError, match="class tokens"):
        Codec(DIM, encoder, FSQ([5]), ConvolutionDecoder(DIM, 3, [6, 8]))


def test_the_gradient_reaches_every_parameter():
    for codec, items in ((picture_codec(), pictures((8, 8), (4, 8))), (sound_codec(), sounds(8, 4))):
        made, _ = codec.reconstruct(codec(items, 2), items)
        made.values.square().sum().backward()
        assert [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()] == []


# ------------------------------------------------------------------ frozen, for targets and inputs


def test_a_frozen_codec_stays_as_it_is():
    frozen = FrozenCodec(picture_codec(VectorQuantizer(DIM, 20)))
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    items = pictures((8, 8), (8, 12))
    ids = frozen.train().codes_of(items)
    assert not frozen.codec.quantizer.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(ids.values, frozen.codec.encode(items).values)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())


def test_target_ids_stand_where_the_tokens_of_patches_do():
    items = pictures((8, 8), (8, 12), (8, 8), (12, 8))
    targets = FrozenCodec(picture_codec()).codes_of(items)
    tokens = image_patches(DIM, 4, 3)(items, 4)
    assert targets.values.shape == (tokens.x.shape[1], 1)
    assert tokens.layout is not None
    assert tokens.layout.samples == targets.rows
    for (rows, columns), place in zip(
        targets.shapes, tokens.position[0].split(list(tokens.layout.lengths)), strict=True
    ):
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        assert torch.equal(place[:, 1:], grid)


def test_pictures_are_inputs_by_way_of_their_ids():
    frozen = FrozenCodec(picture_codec())
    batch = random_batch(9)
    embedder = CodeEmbedder(DIM, frozen.codec.quantizer.sizes, codec=frozen)
    tokens = Encoder(embedder)(batch.inputs["image"], 9)
    embedder.codec = None
    torch.testing.assert_close(tokens.x, embedder(frozen.codes_of(batch.inputs["image"]), 9).x)
