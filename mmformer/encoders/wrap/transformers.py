"""Any base model of transformers as an encoder of texts, pictures or sounds."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmformer.batch import Ragged
from mmformer.encoders.wrap.weights import library, local, read_tensors
from mmformer.encoders.wrap.wrapper import Features, Wrapper

_NOT_ARCHITECTURE = (
    "architectures", "auto_map", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version",
)  # fmt: skip
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


class Transformers(Wrapper):
    """The last hidden state of a model of transformers, as tokens.

    `config` is the model's, plain: `model_type`, and what differs from that type's defaults. `weights` is a folder, a
    file or a hub's id, or None for random ones; a folder or an id brings its own config, to which `config` then adds.
    `input` says how items enter (`TextInput`, `PictureInput`, `WaveformInput`, `MelInput`). `architecture` is the class
    of the model where AutoModel does not choose it (ClapAudioModel), `part` the submodule that is meant (encoder of
    Whisper), `width` its channels where its config does not say them.

    SpecAugment of the library is off: it draws from a generator that a resumed run cannot set.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a config that names no model, or would fetch code; weights that lack a tensor.
    """

    def __init__(
        self,
        dim: int,
        config: Mapping[str, Any],
        input: nn.Module,
        *,
        weights: str | None,
        architecture: str = "AutoModel",
        part: str = "",
        modality: str | None = None,
        width: int | None = None,
    ):
        model, described = create(dict(config), weights, architecture, part)
        backbone = model.get_submodule(part)
        channels = _width(backbone) if width is None else width
        super().__init__(backbone, channels, dim, modality or str(input.modality), {"config": described})
        self.input = input

    def features(self, items: Ragged) -> Iterable[Features]:
        return self.input(self.backbone, items)


def create(
    config: dict[str, Any], weights: str | None, architecture: str, part: str = ""
) -> tuple[Any, dict[str, Any]]:
    """A model in float32 of one of transformers' classes, and the plain config that describes it.

    Raises:
        ValueError: a config that names no model, or would fetch code; weights that lack a tensor of `part`.
    """
    transformers = library("transformers")
    path = None if weights is None else local(weights)
    file = path if path is not None and path.is_file() else None
    if weights is None or "model_type" in config or file is not None:
        described = _from_values(transformers, config)
    else:
        described = _from_weights(transformers, architecture, path or weights, config)
    _refuse_code(described)
    for name in ("apply_spec_augment", "use_pretrained_backbone"):
        if hasattr(described, name):
            setattr(described, name, False)
    found = _model_class(transformers, architecture, described)
    # A pooler is no part of the last hidden state, and many files lack it.
    takes_pooler = "add_pooling_layer" in inspect.signature(found.__init__).parameters
    options: dict[str, Any] = {"dtype": torch.float32} | ({"add_pooling_layer": False} if takes_pooler else {})
    if weights is None:
        return found._from_config(described, **options), plain(described)
    if file is not None:
        options["state_dict"] = read_tensors(file)
    model, report = found.from_pretrained(
        None if file else path or weights, config=described, output_loading_info=True, **options
    )
    _check(report, part, weights)
    return model, plain(described)


def _refuse_code(config: Any) -> None:
    """Refuse a config under which transformers would fetch code (kernels of a hub) or change the weights.

    Raises:
        ValueError: it names what was asked for.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name, known in (("_attn_implementation", _ATTENTION), ("_experts_implementation", _EXPERTS)):
            value = getattr(part, name, None)
            if value is not None and value not in known:
                raise ValueError(f"config.{name} is {value!r}, which would fetch code: choose of {', '.join(known)}")
        if getattr(part, "quantization_config", None):
            raise ValueError("config.quantization_config: quantized weights are not read, take the full ones")


def plain(config: Any) -> dict[str, Any]:
    """The architecture that a config of transformers describes, as JSON holds it and without a path of this machine."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: kept(part) for name, part in value.items() if name[:1] != "_" and name not in _NOT_ARCHITECTURE}

    return kept(json.loads(config.to_json_string(use_diff=False)))


def _width(backbone: Any) -> int:
    """Channels of a model's last hidden state, as its config says.

    Raises:
        ValueError: a config that does not say, or a part that has none.
    """
    config = getattr(backbone, "config", None)
    found = getattr(config, "hidden_size", None) or getattr(config, "hidden_sizes", [None])[-1]
    if found is None:
        raise ValueError(f"{type(backbone).__name__} does not say how many channels it has: give them as `width`")
    return found


def _from_values(transformers: Any, config: dict[str, Any]) -> Any:
    """A config object of plain values."""
    kind = config.get("model_type")
    known = transformers.CONFIG_MAPPING
    if kind not in known:
        raise ValueError(f"config.model_type is {kind!r}: give one of transformers, such as 'bert' or 'vit'")
    return known[kind](**{name: value for name, value in config.items() if name != "model_type"})


def _from_weights(transformers: Any, architecture: str, weights: Path | str, changes: dict[str, Any]) -> Any:
    """The config of a folder or a hub's id, with some values changed."""
    reader = getattr(getattr(transformers, architecture, None), "config_class", None) or transformers.AutoConfig
    try:
        found = reader.from_pretrained(weights, **changes)
    except OSError as error:
        raise OSError(f"weights {str(weights)!r} bring no config of transformers: {error}") from error
    return found


def _model_class(transformers: Any, architecture: str, config: Any) -> Any:
    """The class of a model, by its name or by what an auto class has for a config."""
    found = getattr(transformers, architecture, None)
    found = getattr(found, "_model_mapping", {}).get(type(config), None) if architecture[:4] == "Auto" else found
    if not inspect.isclass(found) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(
            f"transformers has no {architecture} for {config.model_type}: name the class as `architecture`"
        )
    return found


def _check(found: Mapping[str, Any], part: str, weights: str) -> None:
    """Whether all tensors of the part were in the weights and of the right shape."""
    start = f"{part}." if part else ""
    wrong = [f"missing {name}" for name in sorted(found["missing_keys"]) if name.startswith(start)]
    wrong += [f"of another shape {name}" for name in sorted(map(str, found["mismatched_keys"]))]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"weights {weights!r} do not fill the model: {'; '.join(wrong[:8])}{more}")
