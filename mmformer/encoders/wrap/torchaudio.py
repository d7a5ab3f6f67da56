"""Encoders of torchaudio: wav2vec 2.0, HuBERT, WavLM over waveforms, Conformer over spectrograms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.encoders.wrap.weights import fill, local, read_tensors
from mmformer.encoders.wrap.wrapper import Features, Wrapper, time_features


class Torchaudio(Wrapper):
    """A model of `torchaudio.models` that is called with items and their lengths, as tokens in time.

    `name` and `options` are those of its factory: wav2vec2_base {}, hubert_large {}, wav2vec2_model {all sizes},
    Conformer {input_dim: mels, ...}. `weights` is a file of them, the name of a bundle of `torchaudio.pipelines`, which
    is downloaded once, or None. `normalize` gives each waveform mean 0 and variance 1, as the large models want.

    Raises:
        ValueError: no such model, weights that do not fit it, or a bundle with the other `normalize`.
    """

    def __init__(
        self,
        dim: int,
        name: str,
        options: Mapping[str, Any],
        *,
        weights: str | None,
        normalize: bool = False,
        modality: str = "audio",
    ):
        from torchaudio import models

        if name not in models.__all__:
            raise ValueError(f"torchaudio.models has no {name!r}: it has {', '.join(models.__all__)}")
        backbone = getattr(models, name)(**options)
        widths = [part.normalized_shape[0] for part in backbone.modules() if isinstance(part, nn.LayerNorm)]
        if not widths:
            raise ValueError(f"torchaudio's {name} is no encoder of the Transformer kind: it has no layer norm")
        if weights is not None:
            fill(backbone, _tensors(backbone, weights, normalize), weights)
        super().__init__(backbone, widths[-1], dim, modality, {"name": name, "options": dict(options)})
        self.normalize = normalize

    def features(self, items: Ragged) -> Iterator[Features]:
        for group in items.groups():
            x = nn.functional.layer_norm(group, group.shape[1:]) if self.normalize else group
            lengths = torch.full((x.shape[0],), x.shape[1], device=x.device)
            yield time_features(self.backbone(x, lengths)[0])


def _tensors(backbone: nn.Module, weights: str, normalize: bool) -> Mapping[str, Tensor]:
    from torchaudio import pipelines

    if weights in pipelines.__all__:
        found: Any = getattr(pipelines, weights).get_model()
        wanted = getattr(found, "normalize_waveform", False)
        if wanted != normalize:
            raise ValueError(f"{weights} was trained with normalize {wanted}, and here it is {normalize}")
        tensors = getattr(found, "model", found).state_dict()
    else:
        path = local(weights)
        if path is None or path.is_dir():
            raise FileNotFoundError(f"weights {weights!r}: give a file, or a bundle of torchaudio.pipelines")
        tensors = read_tensors(path)
    has_head = getattr(backbone, "aux", None) is not None
    return {name: tensor for name, tensor in tensors.items() if has_head or not name.startswith("aux.")}
