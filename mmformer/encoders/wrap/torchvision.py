"""Any classifier of torchvision as an encoder of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.encoders.patches import Normalize
from mmformer.encoders.wrap.weights import fill, local, read_tensors
from mmformer.encoders.wrap.wrapper import Features, Wrapper, count_prefix, picture_features

_NODE = "features"


class Torchvision(Wrapper):
    """What one node of a torchvision model gives, as tokens: one for each place of a map, or of a sequence.

    `name` and `options` are those of `torchvision.models.get_model`; `node` is a name that
    `torchvision.models.feature_extraction.get_graph_node_names` lists: layer4 of a ResNet, features of a ConvNeXt,
    permute of a Swin, encoder.ln of a ViT. `weights` is a file, a name of torchvision (ResNet18_Weights.DEFAULT) that
    is downloaded once, or None. Pictures are normalised by the `mean` and `std` (0 to 1) of the model's own weights.

    Raises:
        ValueError: no classifier of that name, or weights that do not fit it.
    """

    def __init__(
        self,
        dim: int,
        name: str,
        node: str,
        options: Mapping[str, Any],
        *,
        weights: str | None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        modality: str = "image",
    ):
        from torchvision.models import get_model_weights
        from torchvision.models.feature_extraction import create_feature_extractor

        model = _create(name, dict(options), weights)
        num_prefix = count_prefix(model)
        backbone = create_feature_extractor(model, {node: _NODE})
        super().__init__(
            backbone, _width(backbone, options), dim, modality, {"name": name, "node": node, "options": dict(options)}
        )
        known = list(get_model_weights(name))[-1].transforms()
        self.normalize = Normalize([255 * m for m in mean or known.mean], [255 * s for s in std or known.std])
        self.num_prefix = num_prefix

    def features(self, items: Ragged) -> Iterator[Features]:
        for group in items.groups():
            x = self.backbone(self.normalize(group).permute(0, 3, 1, 2))[_NODE]
            yield picture_features(x, group.shape[1], group.shape[2], self.num_prefix)


def _create(name: str, options: dict[str, Any], weights: str | None) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision has no classifier {name!r}: torchvision.models.list_models() lists them")
    if refused := {"weights", "weights_backbone", "pretrained"} & set(options):
        raise ValueError(f"options {sorted(refused)} of torchvision download: name the file by `weights`")
    model = models.get_model(name, weights=None, **options)
    if weights is not None:
        fill(model, _tensors(weights), weights)
    return model


def _tensors(weights: str) -> Mapping[str, Tensor]:
    from torchvision.models import get_weight

    if weights.partition(".")[0].endswith("_Weights"):
        return get_weight(weights).get_state_dict(progress=False, check_hash=True)
    path = local(weights)
    if path is None or path.is_dir():
        raise FileNotFoundError(f"weights {weights!r}: give a file, or a name such as ResNet18_Weights.DEFAULT")
    return read_tensors(path)


def _width(backbone: nn.Module, options: Mapping[str, Any]) -> int:
    """Channels of the node, which torchvision says nowhere: those of a black picture."""
    side = options.get("image_size", 224)
    training = backbone.training
    with torch.no_grad():
        x = backbone.eval()(torch.zeros(1, 3, side, side))[_NODE]
    backbone.train(training)
    return x.shape[1] if x.ndim == 4 else x.shape[-1]
