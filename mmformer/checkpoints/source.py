"""Where weights come from: a file, a folder, a hub repository, a tracker's artefact; told apart by what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmformer.checkpoints.formats import read_weights
from mmformer.checkpoints.hub import SIDE, WEIGHTS, fetch, fetch_artefact
from mmformer.checkpoints.store import RefusedFile, TensorStore

CONFIGS = ("config.json", "open_clip_config.json")
OWN_RUN, OWN_MODEL = "config.yaml", "model"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The tensors of a checkpoint, what it says of itself, and the files that lie beside it.

    `origin` names it in messages. `config` is its `config.json` or `open_clip_config.json`; `files` are side files by
    name, such as tokenizer.json or preprocessor_config.json; `extra` holds the plain values saved beside the weights.
    """

    origin: str
    tensors: TensorStore
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def has(self, *names: str) -> bool:
        """Whether all of these tensors are there."""
        return all(name in self.tensors for name in names)

    def json(self, name: str) -> dict[str, Any]:
        """The content of a side file, empty where there is none.

        Raises:
            RefusedFile: no JSON object.
        """
        return _json(self.files[name]) if name in self.files else {}


def open_source(path_or_id: str | Path, weights: str | None = None) -> Source:
    """Open a checkpoint; tensors are read when they are asked for.

    `path_or_id` is a file, a folder (of transformers, open_clip, timm, or of a run of our own), `org/name` or
    `org/name@revision` of the Hugging Face hub (`hf:name` for one without an organisation), or
    `wandb:entity/project/name:alias`. `weights` names the file to take where a folder has several.

    Raises:
        FileNotFoundError: nothing there.
        RefusedFile: damaged, of no known format, or one that could run code.
    """
    text = str(path_or_id)
    if text.startswith("wandb:"):
        return replace(_open_folder(fetch_artefact(text.removeprefix("wandb:")), weights), origin=text)
    if re.match(r"\w+://", text):
        raise ValueError(f"{text} is an address: download the file and give its path")
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return _open_folder(path, weights)
    if path.is_file():
        return _open_file(path)
    if text.startswith("hf:") or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", text):
        return replace(_open_folder(fetch(text.removeprefix("hf:"), weights), weights), origin=text)
    raise FileNotFoundError(f"{text}: no such file or folder, and no org/name of the hub")


def source_of(
    tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None, origin: str = "the tensors in memory"
) -> Source:
    """A source of tensors that are in memory: a `state_dict`."""
    return Source(origin=origin, tensors=TensorStore.of(tensors).unwrapped(), config=dict(config or {}))


def _open_folder(folder: Path, weights: str | None) -> Source:
    """A folder by what lies in it; a run of our own by its model, or by its best checkpoint."""
    if weights is None and (folder / OWN_MODEL / "model.safetensors").is_file():
        folder = folder / OWN_MODEL
    names = (weights,) if weights else (*WEIGHTS, "checkpoints/best.ckpt")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        loose = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".pt", ".pth", ".ckpt")]
        if weights or len(loose) != 1:
            there = ", ".join(path.name for path in loose) or "none"
            raise FileNotFoundError(f"{folder} has no {' or '.join(names)}; other files of weights: {there}")
        found = loose[0]
    return _open(found, folder, str(folder))


def _open_file(path: Path) -> Source:
    """A file, with the config beside it where its name says that the two belong together."""
    folder = path.parent if path.name in WEIGHTS else None
    if path.parent.name == "checkpoints":  # of a run
        folder = path.parent.parent
    return _open(path, folder, str(path))


def _open(path: Path, folder: Path | None, origin: str) -> Source:
    tensors, extra = read_weights(path)
    beside = [] if folder is None else [p for p in sorted(folder.iterdir()) if p.name.endswith(SIDE) and p.is_file()]
    files = {p.name: p for p in beside}
    config = CONFIGS[::-1] if path.name.startswith("open_clip") else CONFIGS
    chosen = next((files[name] for name in config if name in files), None)
    return Source(
        origin=origin,
        tensors=tensors.unwrapped(),
        config=_json(chosen) if chosen else {},
        files=files,
        extra=extra,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RefusedFile(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise RefusedFile(f"{path} holds {type(content).__name__}, where a config belongs")
    return content
