"""Pictures and log-mel spectrograms to a few ids and back: an autoencoder around a quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.encoders.patches import Grid, Normalize, PlaneEmbedder
from mmformer.nn.position import AXES
from mmformer.nn.quantize import Quantized, Quantizer
from mmformer.tokens import Tokens


class ConvolutionDecoder(nn.Module):
    """A `ConvolutionStem` backwards: a linear map, then a norm, ReLU and a transposed convolution for each doubling.

    `channels` and `widths` are those of the stem. With `num_columns` a cell of its input stands for that many columns.
    """

    def __init__(self, dim: int, channels: int, widths: Sequence[int], num_columns: int | None = None):
        super().__init__()
        self.num_columns, self.factor = num_columns, 2 ** len(widths)
        self.linear = nn.Linear(dim, widths[-1] * (num_columns or 1))
        self.layers = nn.Sequential()
        for inside, outside in pairwise([*reversed(widths), channels]):
            self.layers.append(nn.GroupNorm(1, inside))
            self.layers.append(nn.ReLU())
            self.layers.append(nn.ConvTranspose2d(inside, outside, 4, stride=2, padding=1))

    def size(self, rows: int, columns: int) -> Grid:
        """Height and width of what a grid of cells becomes."""
        return rows * self.factor, (self.num_columns or columns) * self.factor

    def forward(self, cells: Float[Tensor, "n r c D"]) -> Float[Tensor, "n h w C"]:
        x = self.linear(cells)
        if self.num_columns is not None:
            x = x.unflatten(-1, (self.num_columns, -1)).flatten(2, 3)
        return self.layers(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def mel_decoder(dim: int, num_mels: int, widths: Sequence[int]) -> ConvolutionDecoder:
    """The decoder that fits the encoder `mel_convolutions`: a cell stands for all mel bins."""
    return ConvolutionDecoder(dim, 1, widths, num_columns=-(-num_mels // 2 ** len(widths)))


class Codec(nn.Module):
    """An autoencoder with a grid of ids in the middle: `encode` gives the ids of items, `decode` items of ids.

    `encoder` makes `dim` channels of each cell of an item, and `decoder` the item of them. A linear map stands before
    and behind a `quantizer` of another number of channels. As an encoder of a `Model` it gives what is about to be
    quantized, which the objective `Reconstruct` goes on from.

    Raises:
        ValueError: an encoder whose tokens are not the cells that the decoder makes an item of.
    """

    def __init__(self, dim: int, encoder: PlaneEmbedder, quantizer: Quantizer, decoder: ConvolutionDecoder):
        super().__init__()
        if encoder.class_tokens is not None:
            raise ValueError("the encoder of a codec has class tokens, which no cell of an item stands for: drop them")
        cells = (2, 2 if decoder.num_columns is None else 1)
        size = decoder.size(*cells)
        if encoder.stem.grid(*size) != cells:
            raise ValueError(
                f"the decoder makes {size[0]} x {size[1]} of {cells[0]} x {cells[1]} cells, of which the encoder "
                f"makes {encoder.stem.grid(*size)}: give both the same widths (and number of columns)"
            )
        same = quantizer.dim == dim
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.inward = nn.Identity() if same else nn.Linear(dim, quantizer.dim)
        self.outward = nn.Identity() if same else nn.Linear(quantizer.dim, dim)
        # Pictures are bytes, and what has no rows but a time is a spectrogram.
        self.pictures = encoder.axes[0] == AXES["row"]

    def forward(self, items: Ragged, num_samples: int) -> Tokens:
        """One vector a cell, not yet quantized; the cells of an item row by row, items in their order."""
        tokens = self.encoder(items, num_samples)
        return tokens.with_x(self.inward(tokens.x))

    @torch.no_grad()
    def encode(self, items: Ragged) -> Ragged:
        """The ids of items: for each a grid (rows, columns) of Q int64 ids, in the order of the items."""
        grids = tuple(self.encoder.stem.grid(*size) for size in _sizes(items))
        latents = self(items, max(items.rows, default=0) + 1).x[0]
        return replace(items, values=self.quantizer.nearest(latents), shapes=grids)

    @torch.no_grad()
    def decode(self, codes: Ragged, like: Ragged | None = None) -> Ragged:
        """The items of ids: (height, width, C) uint8 of a picture's, (frames, mels) float32 of a spectrogram's.

        Their sides are multiples of a cell; `like` cuts each to the size of the item that the ids are of.

        Raises:
            ValueError: ids that are not those of `like`.
        """
        sizes = [self.decoder.size(*grid) for grid in codes.shapes] if like is None else _sizes(like)
        grids = tuple(self.encoder.stem.grid(*size) for size in sizes)
        if grids != codes.shapes:
            raise ValueError(f"grids of {codes.shapes[:4]}... ids, but items like {grids[:4]}...: give the items' own")
        return self.items(self._decode(self.quantizer.vectors(codes.values), sizes, codes.rows))

    def reconstruct(self, latents: Tokens, items: Ragged) -> tuple[Ragged, Quantized]:
        """Items as they come back, on the scale of `normalize`, and their codes; `latents` is what `forward` gave."""
        quantized = self.quantizer(latents.x[0])
        return self._decode(quantized.x, _sizes(items), items.rows), quantized

    def normalize(self, items: Ragged) -> Ragged:
        """Items on the scale that the network works on."""
        return replace(items, values=self.encoder.normalize(items.values.float()))

    def items(self, normalized: Ragged) -> Ragged:
        """`normalize` undone: bytes of pictures, floats of spectrograms."""
        normalize = self.encoder.normalize
        assert isinstance(normalize, Normalize)
        values = normalized.values.float() * normalize.std + normalize.mean
        return replace(normalized, values=values.round().clamp(0, 255).byte() if self.pictures else values)

    def _decode(self, x: Float[Tensor, "T Q"], sizes: Sequence[Grid], rows: tuple[int, ...]) -> Ragged:
        """Items of `sizes` on the network's scale, of the vectors of all their cells."""
        x = self.outward(x)
        out, start = [], 0
        for size, same in groupby(sizes):
            shape = (len(list(same)), *self.encoder.stem.grid(*size), x.shape[-1])
            stop = start + prod(shape[:3])
            plane = self.decoder(x[start:stop].view(shape))[:, : size[0], : size[1]]
            out.append(plane.flatten(0, 2) if self.pictures else plane.flatten(0, 1)[..., 0])
            start = stop
        shapes = tuple(size if self.pictures else size[:1] for size in sizes)
        return Ragged(values=torch.cat(out), shapes=shapes, rows=rows)


class FrozenCodec(nn.Module):
    """A trained codec that stays as it is: for the targets of masked modelling, or for a `CodeEmbedder` to read."""

    def __init__(self, codec: Codec):
        super().__init__()
        self.codec = codec.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenCodec:
        """Its codebooks are never trained: it stays in evaluation mode."""
        return super().train(False)

    def codes_of(self, items: Ragged) -> Ragged:
        """The Q ids of each cell: of each token, where the model's encoder cuts items into the same cells.

        `values` (T, Q) are in the order of the packed tokens of an embedder without class tokens.
        """
        return self.codec.encode(items)


def _sizes(items: Ragged) -> list[Grid]:
    """Height and width of each picture, frames and mels of each spectrogram."""
    if items.values.ndim != 2:
        raise ValueError("a codec takes pictures (height, width, channels) or log-mel spectrograms (frames, mels)")
    return [shape if len(shape) == 2 else (shape[0], items.values.shape[1]) for shape in items.shapes]
