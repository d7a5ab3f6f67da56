from __future__ import annotations

import functools
import sys

import pytest
import torch

from mmformer.checkpoints import RefusedTarget, build
from mmformer.nn import Block
from mmformer.objectives import info_nce

PATH = "CANARY"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.run",
        "torch.load",
        "torch.hub.load",
        "hydra.utils.call",
        "hydra.utils.instantiate",
        "mmformer.checkpoints.build.build",  # would build anything, with trust=True
        "mmformer.checkpoints.load_model",
        "mmformer.fusion.torch.load",  # starts well and leads elsewhere
        "mmformer.datasets.sources.os.system",
        "mmformer.datasets.sources.io.open",
        "mmformer.modelling.Evil",  # a neighbour that only begins with the same letters
        "torch.nnx.Evil",
        "torch.nn.functional.torch.load",
        "torch.nn.functional.handle_torch_function",
        "functools.partialmethod",
        "mmformer.datasets.tokenizers.ByteTokenizer.save",  # a method of a part, which writes a file
    ],
)
@pytest.mark.parametrize("place", ["top", "nested", "partial"])
def test_anything_but_parts_is_refused(target, place, tmp_path):
    canary = tmp_path / PATH
    evil = {"_target_": target, "_args_": [f"touch {canary}"]}
    config = {
        "top": evil,
        "nested": {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Identity", "x": [evil]}]},
        "partial": {"_target_": "functools.partial", "_args_": [evil]},
    }[place]
    with pytest.raises(RefusedTarget) as caught:
        build(config, origin="model/config.json")
    assert f"model/config.json asks for {target}" in str(caught.value)
    assert "trust=True" in str(caught.value)
    assert not canary.exists()


def test_a_lookup_of_something_else_is_refused():
    with pytest.raises(RefusedTarget, match=r"os\.system"):
        build({"_target_": "hydra.utils.get_method", "path": "os.system"})


def test_an_interpolation_is_refused(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    with pytest.raises(RefusedTarget, match="must be resolved"):
        build({"_target_": "torch.nn.Linear", "in_features": "${oc.env:SECRET}", "out_features": 2})


def test_parts_are_built():
    linear = build({"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2})
    assert isinstance(linear, torch.nn.Linear)
    partial = build({"_target_": "mmformer.nn.Block", "_partial_": True, "attention": None})
    assert isinstance(partial, functools.partial)
    assert partial.func is Block
    assert build({"_target_": "hydra.utils.get_method", "path": "mmformer.objectives.info_nce"}) is info_nce
    gelu = build({"_target_": "torch.nn.functional.gelu", "_partial_": True})
    assert torch.equal(gelu(torch.ones(1)), torch.nn.functional.gelu(torch.ones(1)))


def test_a_package_of_ones_own_is_allowed_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text("import os\nclass Smell:\n    def __init__(self, dim): self.dim = dim\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {"_target_": "my_parts.Smell", "dim": 3}
    with pytest.raises(RefusedTarget, match=r"allow=\['my_parts'\]"):
        build(config)
    assert "my_parts" not in sys.modules, "a refused module was imported"
    assert build(config, allow=["my_parts"]).dim == 3
    assert build(config, allow=["my_parts."]).dim == 3
    assert build(config, trust=True).dim == 3
    with pytest.raises(RefusedTarget, match="defined in posix"):
        build({"_target_": "my_parts.os.system", "_args_": ["true"]}, allow=["my_parts"])


def test_a_part_that_is_gone_or_takes_other_arguments_says_so():
    with pytest.raises(ValueError, match=r"asks for mmformer\.nn\.Gone, which cannot be imported"):
        build({"_target_": "mmformer.nn.Gone"})
    with pytest.raises(ValueError, match="does not fit this version of mmformer"):
        build({"_target_": "torch.nn.Linear", "inputs": 3})
