"""Train a codec: give back what came in, through as few bits as its codes have."""

from __future__ import annotations

from math import log2, log10, prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmformer.batch import Batch, Ragged
from mmformer.codec import Codec
from mmformer.model import Encoded, Model
from mmformer.objectives.objective import Objective
from mmformer.objectives.ranks import active, nothing, shared_mean
from mmformer.tokens import Tokens

PEAK = 255.0
"""The largest value of a picture, for PSNR."""


class Reconstruct(Objective):
    """The squared error of what a codec gives back, on its network's scale, and what its quantizer asks for.

    The encoder `source` of the model must be a `Codec`.

    Raises:
        TypeError: it is none.
    """

    headline = ("mse", "min")
    by_subset = False  # an item comes back from itself alone

    def __init__(self, source: str):
        super().__init__()
        self.source = source

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        codec, none = self._codec(model), nothing(model)
        if self.source not in encoded:
            # as often as a process that has items asks for those of all
            return {name: shared_mean(none, 0) for name in ("loss", "commitment")} if active() else {}
        items = batch.inputs[self.source]
        made, quantized = codec.reconstruct(encoded[self.source], items)
        error = F.mse_loss(made.values.float(), codec.normalize(items).values, reduction="sum")
        losses = {"loss": shared_mean(error, made.values.numel())}
        found, cells = quantized.commitment, len(quantized.ids)
        commitment = shared_mean(none if found is None else found * cells, cells)
        return losses if found is None else losses | {"commitment": commitment}

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """`error`: the mean squared error of a sample's items in their own units; NaN for a sample without any.

        `codes`: its ids, -1 behind the last; `sizes`: those of the codebooks; `peak`: 255 for pictures, NaN for sounds.
        """
        if self.source not in encoded:
            return {}
        codec, items = self._codec(model), batch.inputs[self.source]
        made, quantized = codec.reconstruct(encoded[self.source], items)
        error = (codec.items(made).values.float() - items.values.float()).square().mean(1)
        sizes = torch.tensor(codec.quantizer.sizes, device=error.device)
        peak = PEAK if codec.pictures else torch.nan
        return {
            "error": _mean_by_sample(error, items, len(batch)),
            "codes": _by_sample(quantized.ids, encoded[self.source]),
            "sizes": sizes.expand(len(batch), -1),
            "peak": error.new_full((len(batch),), peak),
        }

    def meter(self) -> ReconstructionMeter:
        return ReconstructionMeter()

    def _codec(self, model: Model) -> Codec:
        codec = model.encoders[self.source]
        if not isinstance(codec, Codec):
            raise TypeError(
                f"encoder {self.source!r} is a {type(codec).__name__}: to reconstruct needs a mmformer.codec.Codec"
            )
        return codec


def _mean_by_sample(values: Float[Tensor, " V"], items: Ragged, num_samples: int) -> Float[Tensor, " B"]:
    """The mean of the values of each sample's items; NaN without any."""
    lengths = torch.tensor([prod(shape) for shape in items.shapes], device=values.device)
    row = torch.tensor(items.rows, device=values.device).repeat_interleave(lengths, output_size=len(values))
    total = values.new_zeros(num_samples).index_add(0, row, values)
    return total / values.new_zeros(num_samples).index_add(0, row, torch.ones_like(values))


def _by_sample(ids: Int[Tensor, "T Q"], tokens: Tokens) -> Int[Tensor, "B L Q"]:
    """The ids of each sample, with -1 behind the last."""
    assert tokens.layout is not None
    found: list[list[Tensor]] = [[] for _ in range(tokens.num_samples)]
    for sample, part in zip(tokens.layout.samples, ids.split(tokens.layout.lengths), strict=True):
        found[sample].append(part)
    rows = [torch.cat(parts) if parts else ids[:0] for parts in found]
    return pad_sequence(rows, batch_first=True, padding_value=-1)


class ReconstructionMeter:
    """How well items come back, and how much of the codebooks is in use.

    `mse` is the mean over samples of their squared error, in the items' own units (grey levels, log-mel energies),
    `psnr` 10 log10(255^2 / mse) in dB, for pictures. Means over the codebooks: `codes_used`, the share of the codes
    that occur, and `perplexity`, how many equally frequent codes would have the same entropy. `bits` are those of a
    sample's ids.
    """

    def __init__(self) -> None:
        self._errors: list[Float[Tensor, " n"]] = []
        self._counts: list[Int[Tensor, " K"]] = []
        self._peak = torch.nan

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None:
        sizes = prediction["sizes"][0].tolist()
        self._peak = float(prediction["peak"][0])
        self._errors.append(prediction["error"].cpu())
        ids = prediction["codes"].flatten(0, 1).cpu()
        columns = ids[ids[:, 0] >= 0].unbind(1)
        fresh = [torch.bincount(column, minlength=size) for column, size in zip(columns, sizes, strict=True)]
        self._counts = [old + new for old, new in zip(self._counts, fresh, strict=True)] if self._counts else fresh

    def compute(self) -> dict[str, float]:
        errors = torch.cat(self._errors or [torch.empty(0)]).double()
        errors = errors[~errors.isnan()]
        if not len(errors):
            return {}
        mse = float(errors.mean())
        psnr = {} if self._peak != self._peak else {"psnr": 10 * log10(self._peak**2 / max(mse, 1e-10))}
        used = [float((count > 0).double().mean()) for count in self._counts]
        shares = [count.double() / count.sum() for count in self._counts]
        perplexities = [float(torch.special.entr(share).sum().exp()) for share in shares]
        bits = int(self._counts[0].sum()) * sum(log2(len(count)) for count in self._counts)
        return {
            "mse": mse,
            **psnr,
            "codes_used": sum(used) / len(used),
            "perplexity": sum(perplexities) / len(perplexities),
            "bits": bits / len(errors),
        }
