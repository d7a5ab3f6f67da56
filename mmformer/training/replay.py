"""A batch that a guard has kept, computed again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.checkpoints import build
from mmformer.model import Encoded, Model
from mmformer.training.diagnosis import Diagnosis, diagnose, from_plain


def replay(path: Path, config: Mapping[str, Any]) -> Diagnosis:
    """What is wrong with the batch of a file, under the weights kept with it; `config` is that of the run.

    In 32 bits on the CPU, and without the weights of the objectives: what only a lower precision makes infinite is not
    seen.

    Raises:
        ValueError: weights that are not those of the config's model.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    origin = str(path)
    model: Model = build(config["module"]["model"], origin=origin)
    objectives = {name: build(part, origin=origin) for name, part in config["module"]["objectives"].items()}
    for objective in objectives.values():
        objective.prepare(model)
    parts = nn.ModuleDict({"model": model, "objectives": nn.ModuleDict(objectives)})
    weights = {name: value for name, value in saved["weights"].items() if not name.startswith("weighting.")}
    try:
        parts.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path} has other weights than the model of the run's config, as adapters make them, so it cannot be"
            f" computed again; what was found at the time is in {path.with_suffix('.json').name} ({error})"
        ) from error
    parts.train()

    def losses(batch: Batch) -> dict[str, Tensor]:
        encoded = model.encode(batch) if any(o.needs_encoded for o in objectives.values()) else Encoded({}, len(batch))
        found = {name: objective(model, encoded, batch) for name, objective in objectives.items()}
        return {f"{name} {part}": loss for name, several in found.items() for part, loss in several.items()}

    return diagnose(parts, losses, from_plain(saved["batch"]), saved["seed"])
