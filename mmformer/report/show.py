"""What a sample holds as elements of a page: its picture, its text, a player for its sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmformer.report.html import Markup, tag
from mmformer.report.media import SECONDS, SIDE, picture, sound

MEDIA_BYTES = 3_500_000

Media = Callable[[Mapping[str, Any], str], bytes | None]
"""The file in a column of a sample (a row of `predictions.parquet`), as bytes; None where it has none.

Raises OSError or ValueError where it cannot be read.
"""


@dataclass
class Budget:
    """Bytes that media may still take: a page must stay small whatever the samples are."""

    left: int = MEDIA_BYTES

    def take(self, size: int) -> bool:
        if size > self.left:
            return False
        self.left -= size
        return True


def show(
    row: Mapping[str, Any], modality: str, media: Media, budget: Budget, *, side: int = SIDE, seconds: int = SECONDS
) -> Markup | None:
    """What a sample has of a modality; a line that says why where it cannot be shown, nothing where it has none.

    `side` is the longest side of a picture in pixels, `seconds` the longest sound.
    """
    if modality == "text":
        return tag("blockquote", cut(row["text"])) if row.get("text") else None
    try:
        data = media(row, modality)
        if data is None:
            return None
        drawn = _audio(data, seconds) if modality == "audio" else _image(data, side)
    except (OSError, ValueError) as error:
        return tag("p", f"{modality} not shown: {cut(str(error), 160)}", class_="absent")
    if not budget.take(len(drawn)):
        return tag("p", f"{modality} not shown, to keep this page small", class_="absent")
    return drawn


def cut(text: str, limit: int = 300) -> str:
    """A text of at most `limit` characters, with an ellipsis where something was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def _image(data: bytes, side: int) -> Markup:
    shown = picture(data, side)
    return tag("img", src=shown.address, alt="the sample's picture", class_="small" if shown.small else None)


def _audio(data: bytes, seconds: int) -> Markup:
    return tag("audio", controls=True, preload="metadata", src=sound(data, seconds))
