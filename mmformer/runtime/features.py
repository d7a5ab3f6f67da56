"""Raw values to the items that a program takes: the features of training, built from plain data, without torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from mmformer.datasets.sources import DecodeError
from mmformer.datasets.tokenizers import Tokenizer, load_tokenizer
from mmformer.runtime.decode import decode_image
from mmformer.runtime.mels import ClapMel, KaldiMel, LogMel, Waveform, WhisperMel
from mmformer.runtime.resize import resize

NAME, TOKENIZER = "feature", "tokenizer"


@runtime_checkable
class Feature(Protocol):
    """Makes an array of a raw value; its first `axes` axes differ from item to item."""

    axes: ClassVar[int]

    def __call__(self, value: Any) -> np.ndarray:
        """The item of a value. Raises DecodeError with the reason where there is none."""
        ...


@dataclass(frozen=True)
class Text:
    """A text to (length,) token ids; a longer one loses its end."""

    tokenizer: Tokenizer
    max_length: int
    begin: bool
    end: bool
    pad: bool

    axes: ClassVar[int] = 1

    def __call__(self, value: Any) -> np.ndarray:
        if not isinstance(value, str):
            raise DecodeError(f"a {type(value).__name__}, not a text")
        specials = self.tokenizer.specials
        before, behind = specials.begin if self.begin else (), specials.end if self.end else ()
        ids = self.tokenizer.encode(value)[: self.max_length - len(before) - len(behind)]
        if not ids:
            raise DecodeError("no token: the text is empty or white space")
        ids = [*before, *ids, *behind]
        if self.pad:
            ids += [specials.pad or 0] * (self.max_length - len(ids))
        return np.array(ids, dtype=np.int64)


@dataclass(frozen=True)
class Picture:
    """A picture to (height, width, channels) uint8, of the size that the rule of training gives it."""

    short: int | None
    longest: int | None
    multiple: int
    channels: int
    steps: Sequence[Any]
    max_pixels: int

    axes: ClassVar[int] = 2

    def __call__(self, value: Any) -> np.ndarray:
        # The steps of published weights had the whole picture.
        reduce_to = None if self.steps else lambda height, width: min(self._resized(height, width))
        picture = decode_image(value, self.max_pixels, reduce_to, self.channels)
        if self.steps:
            picture = self._step(picture)
        height, width = self._resized(*picture.shape[:2])
        return resize(picture, height, width)

    def _step(self, picture: np.ndarray) -> np.ndarray:
        from PIL import Image

        image = Image.fromarray(picture[..., 0] if self.channels == 1 else picture)
        for step in self.steps:
            self._check(image.size[::-1], step.size(image.height, image.width))
            image = step(image)
        found = np.array(image)
        return found[..., None] if self.channels == 1 else found

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        scale = self.short / min(height, width) if self.short else 1.0
        if self.longest:
            scale = min(scale, self.longest / max(height, width))
        down, across = (max(1, round(side * scale / self.multiple)) * self.multiple for side in (height, width))
        self._check((height, width), (down, across))
        return down, across

    def _check(self, old: Sequence[int], new: Sequence[int]) -> None:
        if new[0] * new[1] > max(self.max_pixels, old[0] * old[1]):
            raise DecodeError(f"{old[1]} x {old[0]} pixels would become {new[1]} x {new[0]}: more than max_pixels")


def feature_of(plain: Mapping[str, Any]) -> Feature:
    """The feature that plain data describe: its name under "feature", beside its settings.

    Raises:
        ValueError: a feature that this version does not know.
    """
    return _built(plain)


def known() -> tuple[str, ...]:
    """The names of the features and the steps of pictures that can be built here."""
    return tuple(_classes())


def _built(value: Any) -> Any:
    if isinstance(value, list):
        return [_built(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    if TOKENIZER in value and len(value) == 1:
        return _tokenizer(value[TOKENIZER])
    name, classes = value.get(NAME), _classes()
    if name not in classes:
        raise ValueError(f"this file wants the feature {name!r}, and this version knows {', '.join(classes)}")
    return classes[name](**{key: _built(part) for key, part in value.items() if key != NAME})


def _classes() -> dict[str, Any]:
    from mmformer.datasets import resize as steps  # imports Pillow

    features = (Text, Picture, Waveform, LogMel, WhisperMel, KaldiMel, ClapMel)
    resizing = (steps.ShortestSide, steps.ShortestSideWithin, steps.Cover, steps.Fit, steps.Squash)
    return {part.__name__: part for part in (*features, *resizing, steps.CentreCrop, steps.WholePatches)}


def _tokenizer(plain: Mapping[str, Any]) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
        return load_tokenizer(path)
