"""Train one Transformer over any mix of modalities: `python train.py`, `python train.py --help`."""

from __future__ import annotations

import os
import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from mmformer.run.folder import run_folder

# Waiting threads spin for long by default, which costs tenfold where anything else runs; too short a spin costs as
# much in wake-ups. Read once, when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> float | None:
    """One run, from the config to its folder; the metric that a sweep optimises."""
    # Heavy imports wait until here, so that --help is instant.
    from mmformer.run.run import Run

    with Run(config) as run:
        data = run.data()
        module = run.module(data)
        trainer = run.trainer()
        if config.fit:
            trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint)
        return run.finish(trainer, module, data)


if __name__ == "__main__":
    from mmformer.run.launch import launch

    sys.exit(launch(main))
