"""The padded form of an encoder, which exports take, gives the tokens of the packed one."""

from functools import partial

import pytest
import torch

from mmformer.batch import Ragged
from mmformer.encoders import (
    ClassTokens,
    Encoder,
    PlaneEmbedder,
    ReadyVectors,
    StridedPatches,
    TextEmbedder,
    TimeEmbedder,
    image_convolutions,
    image_patches,
    mel_convolutions,
    mel_frames,
    mel_patches,
    waveform_convolutions,
)
from mmformer.encoders.patches import Normalize
from mmformer.nn import Attention, Block, LearnedGrid, Rotary, Sinusoid, Transformer
from mmformer.nn.position import ConvolutionPosition, StretchedGrid
from mmformer.tokens import to_padded
from tests.helpers import scramble

GRID = partial(LearnedGrid, num_positions=9)
LAYER = partial(Block, attention=partial(Attention, num_heads=2, rotary=Rotary))


def strided(dim: int) -> PlaneEmbedder:
    stem = StridedPatches(dim, 3, (5, 4), (3, 2))
    return PlaneEmbedder(dim, stem, Normalize([3.0], [2.0]), modality="image", axes=("row", "column"), position=GRID)


def classes(dim: int) -> ClassTokens:
    return ClassTokens(dim, 2, positions=True)


PICTURES = [(8, 12, 3), (12, 4, 3), (8, 8, 3), (12, 12, 3)]
SOUNDS = [(8, 5), (20, 5), (12, 5)]
WAVES = [(40,), (75,), (61,)]
TEXTS = [(3,), (7,), (1,)]
LOCAL = {
    "text": (TextEmbedder(8, 50, Sinusoid), TEXTS),
    "patches": (image_patches(8, 4, 3, GRID), PICTURES),
    "patches with class tokens": (image_patches(8, 4, 3, GRID, class_tokens=classes), PICTURES),
    "strided patches": (strided(8), PICTURES),
    "mel patches": (mel_patches(8, 5, 4, Sinusoid), SOUNDS),
    "waveform": (waveform_convolutions(8, [(6, 10, 5), (7, 3, 2)], Sinusoid), WAVES),
    "vectors": (TimeEmbedder(5, ReadyVectors()), SOUNDS),
}
WHOLE = {
    "picture convolutions": (image_convolutions(8, [4, 6], 3, GRID), [(11, 8, 3)] * 3),
    "mel convolutions": (mel_convolutions(8, 5, [4, 6], Sinusoid), [(13, 5)] * 3),
    "frames": (mel_frames(8, 5, Sinusoid), [(9, 5)] * 3),
    "stretched grid": (image_patches(8, 4, 3, partial(StretchedGrid, rows=5, columns=3)), [(8, 12, 3)] * 3),
    "norm over time": (waveform_convolutions(8, [(6, 10, 5)], time_norm=True), [(40,)] * 3),
}


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 50, shape).to(dtype) if dtype != torch.float32 else torch.randn(shape)


def both(encoder: Encoder, shapes: list, kind: torch.dtype):
    """Packed items, and the same filled up with noise; one row more has none."""
    items = [draw(shape, kind) for shape in shapes]
    axes = 1 if kind == torch.int64 or len(shapes[0]) < 3 else 2
    packed = Ragged.stack(items, range(len(items)), len(shapes[0]) - axes)
    most = tuple(map(max, zip(*shapes, strict=True)))
    values = draw((len(items) + 1, *most), kind)
    for row, item in enumerate(items):
        values[(row, *map(slice, item.shape))] = item
    size = torch.tensor([*(shape[:axes] for shape in shapes), (0,) * axes])
    return to_padded(encoder(packed, len(items) + 1)), encoder.padded(values, size)


def kind_of(name: str) -> torch.dtype:
    if name == "text":
        return torch.int64
    return torch.uint8 if "patches" in name and "mel" not in name else torch.float32


@pytest.mark.parametrize("name", [*LOCAL, *WHOLE])
def test_padded_is_packed(name):
    embedder, shapes = (LOCAL | WHOLE)[name]
    assert getattr(embedder, "local", True) == (name in LOCAL)
    stages = [] if name == "vectors" else [Transformer(8, 1, [LAYER])]
    if kind_of(name) != torch.uint8:  # what reads tokens in a row knows nothing of the end of a picture's line
        stages.append(ConvolutionPosition(8 if stages else 5, 3, 1))
    encoder = scramble(Encoder(embedder, stages)).eval()
    packed, padded = both(encoder, shapes, kind_of(name))
    for row in range(len(shapes) + 1):
        mine, theirs = padded.valid[row], packed.valid[row]
        torch.testing.assert_close(padded.x[row][mine], packed.x[row][theirs], rtol=1e-4, atol=1e-4)
        assert padded.position[row][mine].tolist() == packed.position[row][theirs].tolist()
    assert not padded.valid[-1].any()


def test_an_embedder_without_a_padded_form_is_named():
    with pytest.raises(TypeError, match="Identity reads packed items only: give it a method `padded`"):
        Encoder(torch.nn.Identity()).padded(torch.zeros(1, 2), torch.ones(1, 1, dtype=torch.long))
