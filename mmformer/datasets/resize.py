"""How published models bring a picture to the size they were trained on: steps for `Picture`, with Pillow's filters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL import Image, ImageOps

Size = tuple[int, int]
"""Height and width in pixels."""


@runtime_checkable
class Step(Protocol):
    """One change of a picture's size."""

    def size(self, height: int, width: int) -> Size:
        """The size that a picture of this one gets."""
        ...

    def __call__(self, picture: Image.Image) -> Image.Image: ...


class _Resize(ABC):
    """A step that resamples, with a `filter` of Pillow: bicubic, bilinear, lanczos and others."""

    filter: str

    def __post_init__(self) -> None:
        if self.filter.upper() not in Image.Resampling.__members__:
            known = ", ".join(name.lower() for name in Image.Resampling.__members__)
            raise ValueError(f"filter {self.filter!r}: give one of {known}")

    @abstractmethod
    def size(self, height: int, width: int) -> Size: ...

    def __call__(self, picture: Image.Image) -> Image.Image:
        height, width = self.size(picture.height, picture.width)
        return picture.resize((width, height), Image.Resampling[self.filter.upper()])


@dataclass(frozen=True)
class ShortestSide(_Resize):
    """Resize so that the shorter side is `side`; the longer is cut to whole pixels, as by torchvision's `Resize`."""

    side: int
    filter: str = "bicubic"

    def size(self, height: int, width: int) -> Size:
        long = int(self.side * max(height, width) / min(height, width))
        return (long, self.side) if width <= height else (self.side, long)


@dataclass(frozen=True)
class ShortestSideWithin(_Resize):
    """Resize so that the shorter side is `side`, less where the longer would exceed `longest`.

    Both are then rounded down to a `multiple`: the rule of ViLT (arXiv 2102.03334).
    """

    side: int
    longest: int
    multiple: int
    filter: str = "bicubic"

    def size(self, height: int, width: int) -> Size:
        scale = self.side / min(height, width)
        new = (self.side, scale * width) if height < width else (scale * height, self.side)
        shrink = min(1.0, self.longest / max(new))
        down, across = (max(1, int(shrink * side + 0.5) // self.multiple) * self.multiple for side in new)
        return down, across


@dataclass(frozen=True)
class Cover(_Resize):
    """Resize, keeping the aspect, to the smallest size that has `height` and `width` inside."""

    height: int
    width: int
    filter: str = "bicubic"

    def size(self, height: int, width: int) -> Size:
        ratio = min(height / self.height, width / self.width)
        return round(height / ratio), round(width / ratio)


@dataclass(frozen=True)
class Fit(_Resize):
    """Resize, keeping the aspect, to the largest size that `height` and `width` have inside."""

    height: int
    width: int
    filter: str = "bicubic"

    def size(self, height: int, width: int) -> Size:
        ratio = max(height / self.height, width / self.width)
        return max(1, round(height / ratio)), max(1, round(width / ratio))


@dataclass(frozen=True)
class Squash(_Resize):
    """Resize to exactly `height` and `width`, whatever the aspect."""

    height: int
    width: int
    filter: str = "bicubic"

    def size(self, height: int, width: int) -> Size:
        return self.height, self.width


@dataclass(frozen=True)
class CentreCrop:
    """Cut `height` and `width` from the middle; what is smaller is first padded with `fill`, grey or each colour.

    Of an odd margin, half a pixel more goes to the end, or with `even` to the side that leaves an even number before
    (torchvision, timm and open_clip; transformers does the former).
    """

    height: int
    width: int
    even: bool = True
    fill: int | Sequence[int] = 0

    def size(self, height: int, width: int) -> Size:
        return self.height, self.width

    def __call__(self, picture: Image.Image) -> Image.Image:
        down, across = max(0, self.height - picture.height), max(0, self.width - picture.width)
        if down or across:
            first = (lambda gap: gap // 2) if self.even else (lambda gap: -(-gap // 2))
            before = first(across), first(down)
            picture = ImageOps.expand(picture, (*before, across - before[0], down - before[1]), self._fill(picture))
        top, left = self._margin(picture.height - self.height), self._margin(picture.width - self.width)
        return picture.crop((left, top, left + self.width, top + self.height))

    def _margin(self, spare: int) -> int:
        return round(spare / 2) if self.even else spare // 2

    def _fill(self, picture: Image.Image) -> int | tuple[int, ...]:
        if isinstance(self.fill, int):
            return self.fill if picture.mode == "L" else (self.fill,) * len(picture.getbands())
        return tuple(self.fill)


@dataclass(frozen=True)
class WholePatches:
    """Cut off, on the right and below, what does not fill a patch; a convolution without padding never sees it."""

    patch: int

    def size(self, height: int, width: int) -> Size:
        return height // self.patch * self.patch, width // self.patch * self.patch

    def __call__(self, picture: Image.Image) -> Image.Image:
        height, width = self.size(picture.height, picture.width)
        return picture.crop((0, 0, width, height))
