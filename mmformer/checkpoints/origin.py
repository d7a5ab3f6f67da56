"""Where the parts of a model came from, as far as the way back needs it; a saved model keeps it as `origins`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mmformer.checkpoints.source import Source
from mmformer.checkpoints.table import Described, Family, Written

PICTURES = ("preprocessor_config.json", "processor_config.json")
WORDS = ("tokenizer_config.json", "special_tokens_map.json")
SIDE = {"text": WORDS, "image": PICTURES, "audio": PICTURES}
LABELS = ("id2label", "label2id", "label_names", "label_descriptions")
"""Names of classes: long lists, of which an encoder alone knows nothing."""

Plain = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that `parts` ("encoders.image") of a model came from; all values are plain.

    `family` is "transformers/vit"; `config`, `layout`, `options` and `files` are what `Family.describe` saw and said.
    A `projected` encoder has a last stage that is not of the checkpoint.
    """

    family: str
    parts: tuple[str, ...]
    config: Plain = field(default_factory=dict)
    layout: Plain = field(default_factory=dict)
    options: Plain = field(default_factory=dict)
    files: dict[str, Plain] = field(default_factory=dict)
    projected: bool = False

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Origin:
        """What `plain` wrote, read from JSON or YAML, where tuples are lists."""
        return cls(**{**plain, "parts": tuple(plain["parts"]), "layout": _tuples(plain.get("layout") or {})})

    def plain(self) -> Plain:
        """Plain values, for a saved config."""
        return _lists(asdict(self))

    @property
    def written(self) -> Written:
        """The checkpoint's own config, layout and side files."""
        return Written(config=self.config, layout=self.layout, files=self.files)


def remember(
    source: Source,
    family: Family,
    described: Described,
    options: Mapping[str, Any] | None = None,
    part: str | None = None,
    projected: bool = False,
) -> Origin:
    """The origin of a model, or of the one encoder `part` of it."""
    model = described.model
    named = [f"{kind}.{name}" for kind in ("encoders", "heads") for name in model.get(kind) or {}]
    named += ["fusion"] * bool(model.get("fusion"))
    named += [f"objectives.{name}" for name in described.objectives]
    parts = (part,) if part else tuple(named)
    wanted = {name for key in parts for name in SIDE.get(key.removeprefix("encoders."), ())}
    return Origin(
        family=f"{family.library}/{family.name}",
        parts=parts,
        config={name: value for name, value in source.config.items() if not (part and name in LABELS)},
        layout=described.layout,
        options=dict(options or {}),
        files={name: source.json(name) for name in sorted(wanted) if name in source.files},
        projected=projected,
    )


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _lists(inner) for key, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, list | tuple) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
