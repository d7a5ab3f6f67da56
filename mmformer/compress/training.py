"""The training of a compressed model: the run that it came from, again, from other weights and with a teacher.

It goes through `mmformer.run` like `python train.py`, on the config that the run left in its folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mmformer.compress.measure import data_of

LABELLED = {"Classes": "SoftClasses", "Labels": "SoftLabels", "Number": "SoftNumber"}
OBJECTIVES = "mmformer.objectives"
MARK = "metrics.json"


def config_of(run: Path) -> dict[str, Any]:
    """The plain config that a run left in its folder.

    Raises:
        FileNotFoundError: there is none.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: give the folder of a run of `python train.py`, not only its model/"
        )
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def taught(objectives: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """An objective beside each that it knows, which learns the same of a teacher; by name, as configs.

    Raises:
        ValueError: none of them has such a counterpart.
    """
    made: dict[str, Any] = {}
    for name, part in objectives.items():
        kind = str(part["_target_"]).rpartition(".")[2]
        if kind in LABELLED:
            compare = {"_target_": f"{OBJECTIVES}.{LABELLED[kind]}", "temperature": temperature}
            own = {"head": part["head"], "source": part.get("source"), "compare": compare}
            made[f"taught_{name}"] = {"_target_": f"{OBJECTIVES}.TaughtOutput", **own}
        elif kind == "NextToken":
            own = {"language": dict(part), "temperature": temperature}
            made[f"taught_{name}"] = {"_target_": f"{OBJECTIVES}.TaughtTokens", **own}
        elif kind in ("Contrastive", "MomentumContrastive"):
            width = {model["heads"][modality]["num_outputs"] for modality in part["modalities"]}
            own = {"modalities": list(part["modalities"]), "dim": max(width), "taught_dim": max(width)}
            weights = {"scale": 14.3, "feature": 2000.0, "affinity": 1.0, "interactive": 1.0}
            made[f"taught_{name}"] = {"_target_": f"{OBJECTIVES}.TaughtContrastive", **own, **weights}
    if not made:
        raise ValueError(
            f"the objectives {sorted(objectives)} have no counterpart that learns from a teacher: train it with "
            "`python train.py pretrained=...` and objectives of your choice"
        )
    return made


def again(run: Path, start: Path, folder: Path, steps: int, rate: float, temperature: float | None) -> dict[str, Any]:
    """The config of a run again, from the weights (and layers) of `start`, in another folder.

    `rate` times its learning rate; with a `temperature` the run itself teaches.
    """
    config = config_of(run)
    moved = {str(config["paths"]["run"]): str(folder.resolve())}
    if named := (config.get("data") or {}).get("path"):
        moved[str(named)] = str(data_of(run).resolve())
    config = _moved(config, moved)
    config |= {"pretrained": str(start.resolve()), "resume": None, "ckpt_path": None, "grafts": [], "fit": True}
    if (folder / "checkpoints").is_dir():
        config["resume"] = str(folder)
    module = config["module"]
    module["optimizer"]["lr"] *= rate
    config["trainer"] |= {"max_steps": steps, "max_epochs": -1}
    if temperature is not None:
        listeners = taught(module["objectives"], module["model"], temperature)
        teacher = {"_target_": f"{OBJECTIVES}.Teacher", "runs": [str(run.resolve())]}
        weights = module.get("weights") or {}
        module["objectives"] |= {"teacher": teacher, **listeners}
        module["weights"] = weights | {f"taught_{name}": weight for name, weight in weights.items()}
        module["weights"] = {name: w for name, w in module["weights"].items() if name in module["objectives"]}
    return config


def train(config: Mapping[str, Any]) -> None:
    """Train and judge, as `python train.py` does, on a plain config."""
    from omegaconf import OmegaConf

    from mmformer.run.config import CONFIG_ERRORS, one_line
    from mmformer.run.folder import FolderError
    from mmformer.run.launch import UserError
    from mmformer.run.run import Run

    try:
        with Run(OmegaConf.create(json.loads(json.dumps(config)))) as run:
            data = run.data()
            module = run.module(data)
            trainer = run.trainer()
            trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint)
            run.finish(trainer, module, data)
    except (FolderError, UserError) as error:
        raise ValueError(str(error)) from error
    except CONFIG_ERRORS as error:
        raise ValueError(
            f"the config.yaml of the run does not fit this version of mmformer ({one_line(error)}): train the run with "
            "this version, or write what is missing into that file"
        ) from error


def _moved(config: Any, moved: Mapping[str, str]) -> Any:
    """A config whose paths lie elsewhere: those that are, or start with, one of `moved`."""
    if isinstance(config, dict):
        return {key: _moved(value, moved) for key, value in config.items()}
    if isinstance(config, list):
        return [_moved(value, moved) for value in config]
    if isinstance(config, str):
        for old, new in moved.items():
            if config == old or config.startswith(f"{old}/"):
                return new + config.removeprefix(old)
    return config
