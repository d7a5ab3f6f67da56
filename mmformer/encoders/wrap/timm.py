"""Any model of timm as an encoder of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.encoders.patches import Normalize
from mmformer.encoders.wrap.weights import library, local
from mmformer.encoders.wrap.wrapper import Features, Wrapper, count_prefix, picture_features


class Timm(Wrapper):
    """What `forward_features` of a timm model gives, as tokens: one for each place of its map, or of its sequence.

    `name` and `options` are those of `timm.create_model` (vit_small_patch14_dinov2, {dynamic_img_size: true});
    `weights` is a file of them, a folder or a hub's id with timm's config.json, which may also say the name, or None
    for random ones. Pictures are normalised by the `mean` and `std` (0 to 1) of the pretrained config, if not given.

    Raises:
        ImportError: timm is not installed.
        ValueError: no name, another than that of the weights, or an option that would read further files.
    """

    def __init__(
        self,
        dim: int,
        name: str | None,
        options: Mapping[str, Any],
        *,
        weights: str | None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        modality: str = "image",
    ):
        timm = library("timm")
        model, described = _create(timm, name, dict(options), weights)
        super().__init__(model, model.num_features, dim, modality, described)
        known = timm.data.resolve_model_data_config(model)
        channels = described["options"].get("in_chans", known["input_size"][0])
        self.normalize = Normalize(
            [255 * value for value in _for_channels(mean or known["mean"], channels)],
            [255 * value for value in _for_channels(std or known["std"], channels)],
        )
        self.num_prefix = getattr(model, "num_prefix_tokens", None) or count_prefix(model)
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"

    def features(self, items: Ragged) -> Iterator[Features]:
        for group in items.groups():
            x = self.backbone.forward_features(self.normalize(group).permute(0, 3, 1, 2))
            if not isinstance(x, Tensor):
                raise ValueError(f"forward_features of this timm model gives a {type(x).__name__}, not one tensor")
            x = x.permute(0, 3, 1, 2) if self.channels_last else x
            yield picture_features(x, group.shape[1], group.shape[2], self.num_prefix)


def _create(timm: Any, name: str | None, options: dict[str, Any], weights: str | None) -> tuple[Any, dict[str, Any]]:
    """The model without its classifier, and what describes it."""
    if refused := {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"} & set(options):
        raise ValueError(f"options {sorted(refused)} of timm read files: name those by `weights`")
    overlay: dict[str, Any] = {}
    source = name
    if weights is not None:
        path = local(weights)
        if path is not None and path.is_file():
            overlay = {"file": str(path), "hf_hub_id": None, "url": ""}
        else:
            source = f"hf-hub:{weights}" if path is None else f"local-dir:{path}"
            known, arguments = _config(weights, path)
            if name not in (None, known):
                raise ValueError(f"weights {weights!r} are of timm's {known}, not of {name}: leave the name out")
            name, options = known, arguments | options
    if name is None or ":" in name:
        raise ValueError(f"name {name!r}: give the name of a timm model; what a hub holds is named by `weights`")
    # timm is strict about weights only where the number of classes is theirs; the classifier goes afterwards.
    if "num_classes" in options:
        overlay["num_classes"] = options["num_classes"]
    model = timm.create_model(source, pretrained=weights is not None, pretrained_cfg_overlay=overlay, **options)
    _drop_classifier(model)
    return model, {"name": name, "options": options}


def _config(weights: str, path: Path | None) -> tuple[str, dict[str, Any]]:
    """Name and options of the model that a folder or a hub's id holds, from timm's config.json in it."""
    if path is None:
        file = Path(library("huggingface_hub").hf_hub_download(weights, "config.json"))
    else:
        file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: name the file of weights itself, and the model by `name`")
    values = json.loads(file.read_text(encoding="utf-8"))
    if "architecture" not in values:
        raise ValueError(f"{file} names no architecture of timm: it is of another library")
    return values["architecture"], dict(values.get("model_args") or {})


def _drop_classifier(model: Any) -> None:
    """Take away what comes behind `forward_features`, which would never get a gradient."""
    heads = model.pretrained_cfg.get("classifier") or ()
    for head in (heads,) if isinstance(heads, str) else heads:
        top = head.partition(".")[0]
        if isinstance(getattr(model, top, None), nn.Module):
            setattr(model, top, nn.Identity())


def _for_channels(values: Sequence[float], channels: int) -> list[float]:
    """One value for each channel; of grey pictures, the mean over the colours."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels
