"""Checkpoints that lie elsewhere: repositories of the Hugging Face hub and artefacts of Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
"""Names of weights in a folder or repository, the first that is there being read."""

SIDE = (".json", ".txt", ".model", ".yaml", "SHA256SUMS")
"""Endings of the small files that come along: configs, vocabularies, tokenizers."""


def fetch(repository: str, weights: str | None = None) -> Path:
    """The local folder of a hub repository `org/name` or `org/name@revision`, with one form of its weights.

    What the local cache holds is not fetched again; with HF_HUB_OFFLINE set, or without network, only the cache counts.

    Raises:
        FileNotFoundError: not in the cache, and the hub cannot be reached or does not have it.
        ImportError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError as error:
        raise ImportError(f"{repository} lies on the hub: pip install 'mmformer[hub]'") from error
    name, _, revision = repository.partition("@")
    try:
        names = HfApi().list_repo_files(name, revision=revision or None)
        wanted = wanted_files(names, weights)
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        reason = error  # no network
    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        why = " ".join(str(reason).split())[:300]
        raise FileNotFoundError(
            f"{repository} is neither a file or folder here, nor in the local cache of the hub, and the hub gives: "
            f"{why}. Download it where there is a network (hf download {name}) and give its folder"
        ) from error


def wanted_files(names: list[str], weights: str | None = None) -> list[str]:
    """The files of a repository that a load needs: side files and one form of the weights, safetensors before pickles.

    Raises:
        FileNotFoundError: no weights of a known name.
    """
    top = [name for name in names if "/" not in name]
    chosen = weights or next((name for name in WEIGHTS if name in top), None)
    if chosen is None or chosen not in names:
        raise FileNotFoundError(f"no {weights or 'weights of a known name'} among {', '.join(sorted(names))[:500]}")
    shards: list[str] = []
    if chosen.endswith(".index.json"):
        stem, _, ending = chosen.removesuffix(".index.json").rpartition(".")
        shards = [name for name in top if name.startswith(f"{stem}-") and name.endswith(f".{ending}")]
    side = [name for name in top if name.endswith(SIDE) and not name.endswith(".index.json")]
    return sorted({chosen, *shards, *side})


def fetch_artefact(name: str) -> Path:
    """The local folder of a Weights & Biases artefact, `entity/project/name:alias`.

    Raises:
        FileNotFoundError: the tracker cannot be reached, or has no such artefact.
        ImportError: wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"wandb:{name} lies on Weights & Biases: pip install wandb") from error
    try:
        artefact: Any = wandb.Api().artifact(name)
        return Path(artefact.download())
    except Exception as error:  # wandb raises errors of several libraries here
        raise FileNotFoundError(
            f"wandb:{name} cannot be fetched: {' '.join(str(error).split())[:300]}. It is written "
            "wandb:entity/project/name:alias; wandb login lets you in"
        ) from error
