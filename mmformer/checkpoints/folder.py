"""A trained model as a folder: weights, config and tokenizer, with the checksum of each.

`model/` holds `model.safetensors`, `config.json`, `tokenizer.json` where there is one, and `SHA256SUMS`, which
`sha256sum -c` reads too. No file of it can run code: see `build`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmformer.checkpoints.build import build
from mmformer.datasets.tokenizers import Tokenizer
from mmformer.encoders.wrap import standalone
from mmformer.model import Model
from mmformer.objectives.objective import Objective

WEIGHTS, CONFIG, TOKENIZER, SUMS = "model.safetensors", "config.json", "tokenizer.json", "SHA256SUMS"
TIED = "tied"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What a folder holds, in evaluation mode; `tokenizer` is the path of `tokenizer.json`."""

    model: Model
    objectives: dict[str, Objective]
    config: dict[str, Any]
    tokenizer: Path | None = None


def save_model(
    folder: Path | str,
    model: Model,
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    objectives: Mapping[str, Objective] | None = None,
) -> Path:
    """Write a model so that `load_model` rebuilds it; a folder that is there already is replaced at once or not at all.

    `config` is plain and resolved: that of a whole run (see `exported`), or with `model`, `objectives` and whatever
    else is to be kept. The tokenizer becomes `tokenizer.json`.

    Raises:
        ValueError: a config without `model`, or that JSON cannot hold.
    """
    folder = Path(folder)
    config = exported(config) if "module" in config else config
    if "model" not in config:
        raise ValueError(f"a config of {sorted(config)} cannot rebuild the model: give its part as config['model']")
    if objectives and set(objectives) != set(config.get("objectives") or {}):
        described = sorted(config.get("objectives") or {})
        raise ValueError(f"objectives {sorted(objectives)}, but config['objectives'] describes {described}")
    config = {**config, "model": standalone(config["model"], model)}
    tensors, tied = _untie(_state(model, objectives or {}))
    text = _to_json({"format": FORMAT, "mmformer": _version(), **config})
    with replacing(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt", TIED: json.dumps(tied)})
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(temporary / TOKENIZER)
        sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
        (temporary / SUMS).write_text("".join(sums), encoding="utf-8")
    return folder


def exported(run: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's config goes with its model: all that predicting needs, and no path of the machine it ran on."""
    data = run["data"]
    kept = {name: data[name] for name in ("features", "columns", "references") if name in data}
    parts = {name: run["module"][name] for name in ("model", "objectives")}
    came = {name: run[name] for name in ("origins", "compressed") if run.get(name)}
    return {"task_name": run["task_name"], **parts, "facts": run["facts"], **kept, **came}


def load_model(folder: Path | str, allow: Sequence[str] = (), trust: bool = False) -> SavedModel:
    """Rebuild what `save_model` wrote, on the CPU and in evaluation mode.

    `allow` names further packages whose parts the config may ask for, `trust` allows all of them.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: a file was changed since it was saved, does not fit the others or names a foreign part.
    """
    folder = _present(Path(folder))
    verify(folder)
    config = _read_config(folder / CONFIG)
    origin = str(folder / CONFIG)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and then overwritten
        model = build(config["model"], allow, trust, origin)
        parts = config.get("objectives") or {}
        objectives = {name: build(part, allow, trust, origin) for name, part in parts.items()}
    _fill(nn.ModuleDict({"model": model, "objectives": nn.ModuleDict(objectives)}), folder / WEIGHTS)
    for part in (model, *objectives.values()):
        part.eval()
    tokenizer = folder / TOKENIZER
    return SavedModel(
        model=model, objectives=objectives, config=config, tokenizer=tokenizer if tokenizer.exists() else None
    )


def _state(model: Model, objectives: Mapping[str, Objective]) -> dict[str, Tensor]:
    return nn.ModuleDict({"model": model, "objectives": nn.ModuleDict(objectives)}).state_dict()


def _untie(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without repetition, each with memory of its own; and, for a name left out, the one it equals."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        kept = first.setdefault(place, name) if tensor.numel() else name
        if kept != name:
            tied[name] = kept
        else:
            tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return tensors, tied


def _fill(module: nn.Module, path: Path) -> None:
    """Copy the weights of a file into a module that must have exactly these."""
    try:
        with safe_open(path, "pt") as file:
            tied = json.loads((file.metadata() or {}).get(TIED, "{}"))
            given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}: copy it again, or train again") from error
    given |= {name: given[kept] for name, kept in tied.items() if kept in given}
    wanted = module.state_dict()
    wrong = [f"missing {name} {tuple(wanted[name].shape)}" for name in wanted if name not in given]
    wrong += [f"unexpected {name} {tuple(given[name].shape)}" for name in given if name not in wanted]
    wrong += [
        f"{name} is {tuple(given[name].shape)} in the file and {tuple(wanted[name].shape)} in the config"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{path} does not fit its {CONFIG}: {'; '.join(wrong[:8])}{more}")
    module.load_state_dict(given, assign=False)


def _to_json(config: Mapping[str, Any]) -> str:
    try:
        return json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the config must be of plain values that JSON holds: {error}") from error


def _version() -> str:
    try:
        return version("mmformer")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"


def _present(folder: Path) -> Path:
    """The folder, or the one it was to replace when the writer was killed between two renames."""
    if folder.is_dir():
        return folder
    if _old(folder).is_dir():
        return _old(folder)
    raise FileNotFoundError(f"{folder} is missing: give the folder of a run that was trained to its end, or its model/")


def verify(folder: Path) -> None:
    """Compare every file with the checksum that was written beside it."""
    sums = folder / SUMS
    if not sums.is_file():
        raise FileNotFoundError(f"{sums} is missing: {folder} is no model that mmformer saved, or not all of it")
    pairs = [line.split("  ", 1) for line in sums.read_text(encoding="utf-8").splitlines() if "  " in line]
    listed = {name: wanted for wanted, name in pairs}
    if lacking := [name for name in (WEIGHTS, CONFIG) if name not in listed]:
        raise ValueError(f"{sums} does not list {', '.join(lacking)}: copy the folder again")
    for name, wanted in listed.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: copy the whole folder")
        if _sha256(path) != wanted:
            raise ValueError(
                f"{path} is damaged: its sha256 is not the one in {SUMS}. Copy the folder again; if you changed the "
                f"file yourself, write the new checksums: (cd {folder} && sha256sum {' '.join(listed)} > {SUMS})"
            )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{path} describes no model: it was not written by mmformer")
    if config.get("format", 0) > FORMAT:
        raise ValueError(
            f"{path} has format {config['format']}, this version reads up to {FORMAT}: "
            f"install mmformer {config.get('mmformer')}"
        )
    return config


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` once all of it lies on the disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a writer that was killed
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for path in temporary.iterdir():
        _to_disk(path)
    _to_disk(temporary)
    old = _old(folder)
    if folder.exists():
        # A folder cannot replace a full one in one step; `load_model` finds the old one if this is killed in between.
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    _to_disk(folder.parent)


def _to_disk(path: Path) -> None:
    """Flush a file or a folder's list of names; Windows has no handle of a folder to flush."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
