"""What is done to a text before the `tokenizers` package gets it, where that cannot do it itself."""

from __future__ import annotations

import base64
import html
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmformer.datasets.sentencepiece import CharacterMap
from mmformer.datasets.tokenizers import valid_text

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Steps over a text; without any, only lone surrogates become U+FFFD.

    `repair` is what OpenAI's CLIP and open_clip do: ftfy (which must be installed), HTML entities, white space joined,
    lower case. `canonical` is SigLIP's: lower case, no punctuation. `characters` is the map of a SentencePiece model.
    """

    repair: bool = False
    canonical: bool = False
    characters: CharacterMap | None = None

    def __call__(self, text: str) -> str:
        text = valid_text(text)
        if self.repair:
            text = " ".join(html.unescape(html.unescape(_fixed(text))).split()).lower()
        if self.canonical:
            text = re.sub(r"\s+", " ", text.replace("▁", " ").lower().translate(_PUNCTUATION)).strip()
        return self.characters(text) if self.characters else text

    def after(self, other: Cleaning) -> Cleaning:
        """These steps and those of another, which come first."""
        return Cleaning(
            repair=self.repair or other.repair,
            canonical=self.canonical or other.canonical,
            characters=self.characters or other.characters,
        )

    def to_plain(self) -> dict[str, Any]:
        """Values that JSON holds."""
        blob = base64.b64encode(self.characters.blob).decode() if self.characters else None
        return {"repair": self.repair, "canonical": self.canonical, "characters": blob}

    @classmethod
    def from_plain(cls, held: Mapping[str, Any]) -> Cleaning:
        blob = held["characters"]
        characters = CharacterMap(base64.b64decode(blob)) if blob else None
        return cls(repair=held["repair"], canonical=held["canonical"], characters=characters)


NONE = Cleaning()
"""No step."""


def _fixed(text: str) -> str:
    try:
        from ftfy import fix_text
    except ImportError as error:
        raise ImportError(
            "this tokenizer repairs texts with ftfy, which is not installed: pip install mmformer[open_clip]"
        ) from error
    return fix_text(text)
