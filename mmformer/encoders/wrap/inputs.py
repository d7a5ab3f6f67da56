"""How items of each kind enter a model of transformers, and what its output is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.encoders.patches import Normalize
from mmformer.encoders.wrap.wrapper import (
    Features,
    count_prefix,
    grid_positions,
    picture_features,
    time_features,
)


class TextInput(nn.Module):
    """Token ids, padded on the right under an attention mask; a call for each length where `pad` is off.

    Turn `pad` off for a model that does not honour a mask. `arguments` go to the model's call as they are.
    """

    modality = "text"

    def __init__(self, *, pad: bool = True, arguments: Mapping[str, Any] | None = None):
        super().__init__()
        self.pad, self.arguments = pad, dict(arguments or {})

    def forward(self, backbone: Any, items: Ragged) -> Iterator[Features]:
        if not self.pad:
            for group in items.groups():
                yield time_features(hidden(backbone(input_ids=group, **self.arguments)))
            return
        lengths = [shape[0] for shape in items.shapes]
        ids = nn.utils.rnn.pad_sequence(list(items.values.split(lengths)), batch_first=True)
        mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
        mask = mask.long().to(ids.device, non_blocking=True)
        yield time_features(hidden(backbone(input_ids=ids, attention_mask=mask, **self.arguments)), lengths)


class PictureInput(nn.Module):
    """Pictures (height, width, C) of bytes, normalised by `mean` and `std` on the scale 0 to 1.

    `num_prefix` tokens stand in front of the patches: by default the class, distillation and register tokens that the
    model has as parameters. `arguments` go to the model's call, such as {interpolate_pos_encoding: true}.
    """

    modality = "image"

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        num_prefix: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.normalize = Normalize([255 * m for m in mean], [255 * s for s in std])
        self.num_prefix, self.arguments = num_prefix, dict(arguments or {})

    def forward(self, backbone: Any, items: Ragged) -> Iterator[Features]:
        num_prefix = count_prefix(backbone) if self.num_prefix is None else self.num_prefix
        for group in items.groups():
            x = hidden(backbone(self.normalize(group).permute(0, 3, 1, 2), **self.arguments))
            yield picture_features(x, group.shape[1], group.shape[2], num_prefix)


class WaveformInput(nn.Module):
    """Waveforms (samples,), a call for each length: group norm, as in wav2vec 2.0 base, must not see padding.

    `normalize` gives each mean 0 and variance 1, as the library's feature extractors do where they say `do_normalize`.
    """

    modality = "audio"

    def __init__(self, normalize: bool, *, arguments: Mapping[str, Any] | None = None):
        super().__init__()
        self.normalize, self.arguments = normalize, dict(arguments or {})

    def forward(self, backbone: Any, items: Ragged) -> Iterator[Features]:
        for group in items.groups():
            x = nn.functional.layer_norm(group, group.shape[1:], eps=1e-7) if self.normalize else group
            yield time_features(hidden(backbone(x, **self.arguments)))


class MelInput(nn.Module):
    """Log-mel spectrograms (frames, mels), given to the model as (n, mels, frames) where `mels_first`.

    `channel` puts an axis of one channel in front (CLAP). `pad_to` frames is what a model of one length wants, filled
    with `pad_value` or, by default, with the least value of the clip, which is silence; tokens of the padding are left
    out. A sequence runs through `bands` rows of patches, one behind another (AST), with class tokens in front; tokens
    come out in the order of time.
    """

    modality = "audio"

    def __init__(
        self,
        *,
        mels_first: bool = False,
        channel: bool = False,
        bands: int = 1,
        pad_to: int | None = None,
        pad_value: float | None = None,
        arguments: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.mels_first, self.channel, self.bands = mels_first, channel, bands
        self.pad_to, self.pad_value, self.arguments = pad_to, pad_value, dict(arguments or {})

    def forward(self, backbone: Any, items: Ragged) -> Iterator[Features]:
        num_prefix = count_prefix(backbone)
        for group in items.groups():
            x = self._padded(group)
            frames = x.shape[1]
            x = x.transpose(1, 2) if self.mels_first else x
            x = hidden(backbone(x[:, None] if self.channel else x, **self.arguments))
            yield self._features(x, 0 if x.ndim == 4 else num_prefix, group.shape[1] / frames)

    def _padded(self, group: Float[Tensor, "n frames mels"]) -> Float[Tensor, "n full mels"]:
        count, frames, mels = group.shape
        if self.pad_to is None or frames == self.pad_to:
            return group
        if frames > self.pad_to:
            raise ValueError(f"a clip of {frames} frames, more than pad_to {self.pad_to}: cut it in the data")
        fill = group.amin((1, 2), keepdim=True) if self.pad_value is None else group.new_tensor(self.pad_value)
        return torch.cat([group, fill.expand(count, self.pad_to - frames, mels)], 1)

    def _features(self, x: Tensor, num_prefix: int, share: float) -> Features:
        """Sort by time, then band; `share` of the time is sound, the rest padding."""
        if x.ndim == 4:
            grid = x.permute(0, 3, 2, 1)  # n, D, bands, times
        elif (x.shape[1] - num_prefix) % self.bands:
            raise ValueError(
                f"{x.shape[1]} tokens, {num_prefix} of them in front, do not divide into {self.bands} bands"
            )
        else:
            grid = x[:, num_prefix:].unflatten(1, (self.bands, -1)).transpose(1, 2)
        count, times, bands = grid.shape[:3]
        kept = -(-times * share // 1)
        return Features(
            x=torch.cat([x[:, :num_prefix], grid.flatten(1, 2)], 1) if num_prefix else grid.flatten(1, 2),
            position=grid_positions(times, bands, ("time", "column"), num_prefix),
            lengths=[num_prefix + min(times, int(kept)) * bands] * count,
        )


def hidden(output: Any) -> Tensor:
    """The last hidden state of a model's output.

    Raises:
        ValueError: a model that gives none, such as one with a head.
    """
    found = getattr(output, "last_hidden_state", None)
    if found is None:
        raise ValueError(f"{type(output).__name__} has no last_hidden_state: name the encoder inside as `part`")
    return found
