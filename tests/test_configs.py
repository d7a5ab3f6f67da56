"""Every config composes, every key of it is an argument, and a default lives once."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmformer.run.config import changes, dotted_keys, drop_absent, one_line

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
FACTS = {
    "modalities": ["text", "image", "audio"],
    "vocab_size": 300,
    "special_ids": [0, 1, 2, 3, 4],
    "mask_id": 4,
    "end_id": 2,
    "space_id": 37,
    "chat": {"user": 297, "assistant": 298, "end": 299},
    "objective": "Classes",
    "num_outputs": 10,
    "mean": 12.5,
    "std": 3.5,
    "label_names": [str(i) for i in range(10)],
    "columns": {},
    "targets": {},
    "monitor": "val/acc",
    "monitor_mode": "max",
}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", ["paths.run=runs/x", "paths.root=.", *overrides])
    config.facts = FACTS
    return config


NEEDED = {"blip2_stage2": " first=runs/a language=runs/b"}
"""What an experiment is not composed without: the runs it builds upon."""

CHOICES = [
    *(f"experiment={name}{NEEDED.get(name, '')}" for name in options("experiment")),
    *(f"trainer={name}" for name in options("trainer")),
    *(f"debug={name}" for name in options("debug")),
    *(f"logger={name}" for name in options("logger")),
    *(f"callbacks={name}" for name in options("callbacks")),
    *(f"hparams_search={name}" for name in options("hparams_search")),
    *(f"fusion@module.model.fusion={name}" for name in options("fusion")),
    *(f"data/tokenizer={name}" for name in options("data/tokenizer")),
    *(f"finetune={name}" for name in options("finetune")),
    *(f"layers={name}" for name in options("layers")),
    "encoder@module.model.encoders=[text,image_swin,audio]",
    "layers=span objective@module.objectives=[answer,span]",
    "data=manifest data.path=rows.csv",
    "data=conversations data.path=chat.jsonl",
    "",
]


REFERRED = ("data.features.image.channels", "data.module.features.image.channels")
"""Written although they are a default, because the encoder's config points at them."""


def nodes(config: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node of a config that names a target."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield key, config
        for name, value in config.items():
            yield from nodes(value, f"{key}.{name}".strip("."))
    elif isinstance(config, list):
        for i, value in enumerate(config):
            yield from nodes(value, f"{key}.{i}")


def complaints(config: DictConfig) -> Iterator[str]:
    """Keys that are no argument of their target, and values that its signature says already."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    for key, node in nodes(plain):
        target = get_object(node["_target_"])
        parameters = inspect.signature(target).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name, value in node.items():
            if name in ("_target_", "_partial_", "_args_", "_convert_") or _is_taken_out(key, name):
                continue
            if name not in parameters:
                if not takes_any:
                    yield f"{key}.{name} is no argument of {node['_target_']}"
            elif f"{key}.{name}" in REFERRED:
                continue
            elif node["_target_"].startswith("mmformer.") and _same(parameters[name].default, value):
                yield f"{key}.{name}={value} is the default of {node['_target_']}: leave it out of one of them"


def _is_taken_out(key: str, name: str) -> bool:
    """Whether a run reads a key of an encoder and takes it out, so that the encoder never sees it."""
    return name == "pretrained" and key.startswith("module.model.encoders.")


def _same(default: Any, value: Any) -> bool:
    return default is not inspect.Parameter.empty and type(default) is type(value) and default == value


@pytest.mark.parametrize("choice", CHOICES)
def test_a_config_composes_and_says_nothing_twice(choice: str) -> None:
    assert not list(complaints(composed(*choice.split())))


def test_every_argument_of_the_trainer_is_listed() -> None:
    given_by_code = {"self", "logger", "callbacks"}
    listed = {str(key) for key in composed().trainer if not str(key).startswith("_")}
    assert listed == set(inspect.signature(pl.Trainer.__init__).parameters) - given_by_code


def test_the_check_itself_finds_a_key_that_is_wrong_and_one_that_is_double() -> None:
    config = composed("+module.optimiser=1", "+module.model.fusion.sequential=false")
    found = " ".join(complaints(config))
    assert "module.optimiser is no argument" in found
    assert "sequential=False is the default" in found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_epoch=3"], "no key 'trainer.max_epoch' in the config; did you mean 'trainer.max_epochs'?"),
        (["optimizer.lr=1"], "no key 'optimizer.lr' in the config; did you mean 'module.optimizer.lr'?"),
        (["data=digit"], "no option 'digit' in group 'data'; did you mean 'digits'?; there are: "),
        (["trainer=gpus"], "no option 'gpus' in group 'trainer'; did you mean 'gpu'?"),
        (["trainer.max_steps=["], "cannot read the override 'trainer.max_steps=['"),
        (
            ["module.model.fusion.pool={rank: 4}"],
            "no key 'module.model.fusion.pool' in the config with these keys in it; "
            "a key more is +module.model.fusion.pool.<key>=<value>",
        ),
        (["sede=1"], "no key 'sede' in the config; did you mean 'seed'?"),
    ],
)
def test_what_is_misspelt_fails_in_one_line_with_the_nearest_name(overrides: list[str], message: str) -> None:
    known = list(dotted_keys(composed()))
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
        composed(*overrides)
    line = one_line(caught.value, known)
    assert message in line
    assert "\n" not in line


def test_a_modality_that_the_data_lack_is_taken_out_of_the_model() -> None:
    config = composed("fusion@module.model.fusion=cross")
    assert drop_absent(config, ["text", "image"]) == ["audio"]
    assert list(config.module.model.encoders) == ["text", "image"]
    assert list(config.module.model.fusion.context) == ["image"]


def test_a_resumed_run_may_change_its_length_and_not_its_model() -> None:
    before = {
        "seed": 0,
        "trainer": {"max_steps": 5, "devices": 1},
        "module": {"model": {"depth": 2}},
        "paths": {"run": "a"},
    }
    now = {
        "seed": 1,
        "trainer": {"max_steps": 9, "devices": 2},
        "module": {"model": {"depth": 3}},
        "paths": {"run": "b"},
    }
    allowed, refused = changes(before, now)
    assert allowed == ["trainer.max_steps: 5 -> 9"]
    assert refused == ["seed: 0 -> 1", "module.model.depth: 2 -> 3"]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'pytorch_lightning', 'numpy', 'wandb'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trainer: cpu, ddp" in done.stdout
