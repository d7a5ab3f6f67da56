"""Libraries that a model can be written for: what their folders hold, and their own loaders as the last check."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNREAD = ("pooler.*", "*.mask_token", "*masked_spec_embed")
"""Tensors that a class has and that no output of the model here depends on: a pooler behind an encoder that has none,
and what stands for hidden places, in pre-training alone."""

LONGEST = 300
"""Characters of another library's error, which may list every tensor."""


@dataclass(frozen=True)
class Opened:
    """How a library opens a folder, and what it then holds, where its names are those of the file.

    `absent` are tensors of its class that it would draw at random, `strange` those of the file that it cannot place.
    """

    how: str
    tensors: dict[str, Tensor] | None
    absent: tuple[str, ...] = ()
    strange: tuple[str, ...] = ()


@dataclass(frozen=True)
class Library:
    """A library by its name, the names of its files, and its loader; `open` raises ImportError where it is missing."""

    name: str
    config: str
    weights: str
    open: Callable[[Path, dict[str, Any]], Opened]


def _open_transformers(folder: Path, config: dict[str, Any]) -> Opened:
    import transformers
    from transformers.utils import logging

    name = (config.get("architectures") or ["AutoModel"])[0]
    loader: Any = getattr(transformers, name, transformers.AutoModel)
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what it would say of missing tensors is returned too
    logging.disable_progress_bar()
    try:
        model, account = loader.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    strange = [*account["unexpected_keys"], *(str(key) for key in account["mismatched_keys"])]
    return Opened(
        f'transformers.{type(model).__name__}.from_pretrained("{{folder}}")',
        None,  # its names in memory are not those of the file
        tuple(sorted(account["missing_keys"])),
        tuple(sorted(strange)),
    )


def _open_timm(folder: Path, config: dict[str, Any]) -> Opened:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return Opened('timm.create_model("local-dir:{folder}", pretrained=True)', model.state_dict())


def _open_open_clip(folder: Path, config: dict[str, Any]) -> Opened:
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}")
    return Opened('open_clip.create_model("local-dir:{folder}")', model.state_dict())


LIBRARIES = (
    Library("transformers", "config.json", "model.safetensors", _open_transformers),
    Library("timm", "config.json", "model.safetensors", _open_timm),
    Library("open_clip", "open_clip_config.json", "open_clip_model.safetensors", _open_open_clip),
)


def try_to_open(library: Library, folder: Path, config: dict[str, Any], wrote: dict[str, Tensor]) -> tuple[str, str]:
    """Open a folder by the library's own loader; how that is written, and what to say of it.

    Raises:
        ValueError: the library refuses it, or holds other tensors than were written.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of the library, about its own past
        try:
            opened = library.open(folder, config)
        except ImportError:
            extra = f"pip install 'mmformer[{library.name}]'"
            return "", f"not opened with {library.name}, which is not installed: {extra} to check it"
        except (RuntimeError, TypeError, KeyError, OSError) as error:
            raise ValueError(f"{library.name} does not open it: {' '.join(str(error).split())[:LONGEST]}") from error
    unread = [name for name in opened.absent if any(fnmatchcase(name, pattern) for pattern in UNREAD)]
    absent = [name for name in opened.absent if name not in unread]
    wrong = [f"it lacks {', '.join(absent)}"] if absent else []
    wrong += [f"it has no place for {', '.join(opened.strange)}"] if opened.strange else []
    if opened.tensors is not None:
        unlike = [n for n in wrote if n not in opened.tensors or not torch.equal(opened.tensors[n], wrote[n])]
        unlike += [name for name in opened.tensors if name not in wrote]
        wrong += [f"it holds otherwise {', '.join(unlike)}"] if unlike else []
    if wrong:
        raise ValueError(f"{library.name} does not hold what was written: {'; '.join(wrong)}")
    names = ", ".join(unread)
    return opened.how, f"not in this model, so drawn anew by {library.name}: {names}" if unread else ""
