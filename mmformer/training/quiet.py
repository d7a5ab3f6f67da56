"""The notices of libraries that say nothing about this run."""

from __future__ import annotations

import logging
import warnings

_NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*dataloader is not resumable.*",
    ".*module\\(s\\) in eval mode at the start of training.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*barrier\\(\\).*",
    ".*when logging on epoch level in distributed setting.*",
)


def silence() -> None:
    """Keep warnings that concern the run, drop tips and deprecations between libraries."""
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", pattern)
    for name in ("pytorch_lightning", "lightning_fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
