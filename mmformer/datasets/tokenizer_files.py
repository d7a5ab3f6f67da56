"""What the files beside a vocabulary say of its special tokens, and what its family does without being told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFamily:
    """The tokens around a text, by their role or themselves, and what those in a role are called by default.

    `extra_ids` is how many sentinels follow the vocabulary; `canonical` says that texts lose case and punctuation.
    """

    begin: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    extra_ids: int = 0
    canonical: bool = False


_END = "<|endoftext|>"
_BERT = TokenizerFamily(
    ("cls_token",),
    ("sep_token",),
    {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"},
)
_ROBERTA = TokenizerFamily(
    ("cls_token",),
    ("sep_token",),
    {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>", "unk_token": "<unk>"},
)
_CLIP_NAMES = {"bos_token": "<|startoftext|>", "eos_token": _END, "pad_token": _END}
_T5 = TokenizerFamily((), ("eos_token",), {"eos_token": "</s>", "pad_token": "<pad>"}, extra_ids=100)
_LLAMA = TokenizerFamily(("bos_token",), (), {"bos_token": "<s>", "eos_token": "</s>"})

FAMILIES: Mapping[str, TokenizerFamily] = {
    "bert": _BERT,
    "distilbert": _BERT,
    "electra": _BERT,
    "mobilebert": _BERT,
    "roberta": _ROBERTA,
    "bart": _ROBERTA,
    "longformer": _ROBERTA,
    "gpt2": TokenizerFamily((), (), {"bos_token": _END, "eos_token": _END}),
    "clip": TokenizerFamily(("bos_token",), ("eos_token",), _CLIP_NAMES),
    "whisper": TokenizerFamily(
        ("<|startoftranscript|>", "<|notimestamps|>"), ("eos_token",), {"eos_token": _END, "pad_token": _END}
    ),
    "t5": _T5,
    "mt5": _T5,
    "siglip": TokenizerFamily((), ("eos_token",), {"eos_token": "</s>", "pad_token": "</s>"}, canonical=True),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "sentencepiece": TokenizerFamily(),
}
"""By the name of its tokenizer class or its model type, in lower case."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What lies beside the vocabulary `path`: settings, names of special tokens by role, and added tokens by id.

    `kind` is what the files say of the family, a key of FAMILIES or another name, or None. `lower_case` is set where a
    `tokenizer.json` leaves out that its weights were trained on lower case, as SigLIP 2's does.
    """

    path: Path
    kind: str | None
    lower_case: bool
    settings: Mapping[str, Any]
    names: Mapping[str, str]
    added: Mapping[int, Mapping[str, Any]]

    @classmethod
    def beside(cls, path: Path) -> TokenizerFiles:
        """Read those that there are.

        Raises:
            ValueError: one that is no JSON object; the message names it.
        """
        settings = _read_object(path.with_name("tokenizer_config.json"))
        named = _read_object(path.with_name("special_tokens_map.json")) | settings
        names = {role: _content(named[role]) for role in _ROLES if named.get(role)}
        extra = named.get("additional_special_tokens") or named.get("extra_special_tokens") or []
        names |= {f"extra_{i}": _content(token) for i, token in enumerate(extra if isinstance(extra, list) else [])}
        ids = _read_object(path.with_name("added_tokens.json"))
        added = {int(i): {"content": content, "special": True} for content, i in ids.items()}
        added |= {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
        model = _read_object(path.with_name("config.json"))
        kind = _kind(settings, model)
        siglip2 = kind == "siglip2" or (kind == "gemma" and "siglip" in str(model.get("model_type")))
        return cls(path, kind, siglip2, settings, names, dict(sorted(added.items())))

    def family(self, guess: str) -> TokenizerFamily:
        """That of the files, or what the vocabulary looks like where they say nothing.

        Raises:
            ValueError: a family without an entry here.
        """
        kind = self.kind or guess
        if kind not in FAMILIES:
            raise ValueError(
                f"{self.path}: how the tokenizer of {kind!r} cuts a text is not known from {self.path.name} alone: "
                f"give its tokenizer.json (save_pretrained of transformers writes it); known: {', '.join(FAMILIES)}"
            )
        return FAMILIES[kind]

    def of(self, family: TokenizerFamily) -> TokenizerFiles:
        """The same, with what the family calls its tokens where the files do not say."""
        return replace(self, names={**family.names, **self.names})

    def around(self, begin: Sequence[str], end: Sequence[str]) -> tuple[list[str], list[str]]:
        """The tokens before and behind a text, unless the settings ask for other ones; a role may be nobody's."""
        if "add_bos_token" in self.settings:
            begin = ["bos_token"] if self.settings["add_bos_token"] else []
        if "add_eos_token" in self.settings:
            end = ["eos_token"] if self.settings["add_eos_token"] else []
        return self._named(begin), self._named(end)

    def _named(self, tokens: Sequence[str]) -> list[str]:
        return [self.names.get(token, token) for token in tokens if token not in _ROLES or token in self.names]

    @property
    def add_prefix_space(self) -> bool:
        return bool(self.settings.get("add_prefix_space", False))


def _kind(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """The class of the tokenizer in lower case, or the type of the model where the class says nothing."""
    name = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or "")
    kind = name.removesuffix("Fast").removesuffix("Tokenizer").lower()
    generic = kind in ("", "pretrained", "tokenizersbackend")
    return str(config.get("model_type", "")).removesuffix("_text_model").lower() or None if generic else kind


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: it holds something else.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a {type(held).__name__}, not a JSON object")
    return held


def _read_object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _content(token: Any) -> str:
    """A token as a string; files may write it with its properties."""
    return token["content"] if isinstance(token, dict) else str(token)
