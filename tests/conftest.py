"""What every test has: fixed seeds, one thread, no network, and the real data where they lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = ROOT / "tests" / "offline"

# Tensors of tests are small: on two cores a second thread costs more than it gives. Child processes keep their own.
torch.set_num_threads(1)

# The network is cut for pytest (by importing) and for every Python that a test starts (by the path).
sys.path.insert(0, str(OFFLINE))
sys.modules.pop("sitecustomize", None)
__import__("sitecustomize")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}

hypothesis.settings.register_profile("mmformer", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("mmformer")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; a test that needs it is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data in ../shared/data, beside the checkout, which is absent")
    return folder
