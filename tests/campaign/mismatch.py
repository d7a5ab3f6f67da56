"""Weights of another model: refused with every tensor that is missing, left over or of another shape."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmformer.checkpoints import build, save_model
from mmformer.checkpoints.load import load_into
from mmformer.checkpoints.report import MisfitError
from tests.campaign.trials import Outcome, attempt, folder, part
from tests.checkpoints.configs import model_config, run_config

Edit = Callable[[dict[str, Any]], None]


def _set(*path: str, value: Any) -> Edit:
    def edit(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return edit


def _without_audio(config: dict[str, Any]) -> None:
    del config["encoders"]["audio"]
    config["fusion"]["stream"].remove("audio")


def _more_heads(config: dict[str, Any]) -> None:
    config["heads"]["other"] = copy.deepcopy(config["heads"]["label"])


EDITS: dict[str, tuple[Edit, set[str]]] = {
    "more classes": (_set("heads", "label", "num_outputs", value=9), {"mismatched"}),
    "a larger vocabulary": (_set("encoders", "text", "embedder", "vocab_size", value=301), {"mismatched"}),
    "larger patches": (_set("encoders", "image", "embedder", "patch", value=8), {"mismatched"}),
    "more mel bins": (_set("encoders", "audio", "embedder", "num_mels", value=6), {"mismatched"}),
    "a deeper fusion": (_set("fusion", "transformer", "depth", value=2), {"missing"}),
    "more latents": (_set("fusion", "num_latents", value=3), {"mismatched"}),
    "no audio": (_without_audio, {"unexpected"}),
    "one head more": (_more_heads, {"missing"}),
}


def one(saved: Path, edit: Edit, statuses: set[str]) -> str | None:
    """Fill an edited model; what is wrong with how that is refused."""
    config = model_config()
    edit(config)
    model = build(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        load_into(model, saved, resize=False)
        return "it was loaded"
    except MisfitError as error:
        report = error.report
    found = {line.status for line in report if line.status in ("missing", "unexpected", "mismatched")}
    if found != statuses:
        return f"{found} instead of {statuses}: {report}"
    if any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()):
        return "something of it was loaded all the same"
    listed = sorted(item.name for line in report for item in line.targets)
    if listed != sorted(before):
        return "not every tensor of the model is on a line"
    load_into(model, saved, strict=False, resize=False)
    return None if 0 < report.share < 1 or statuses == {"unexpected"} else f"a share of {report.share}"


def trials(share: float, seed: int) -> Iterator[Outcome]:
    """8 edits of an architecture."""
    with folder("C2") as root:
        config = run_config()
        save_model(root / "model", build(config["model"]), config)
        for name, (edit, statuses) in part(list(EDITS.items()), share):
            yield attempt(name, partial(one, root / "model", edit, statuses))
