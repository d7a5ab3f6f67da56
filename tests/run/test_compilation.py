from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmformer.nn import FeedForward
from mmformer.run.compilation import compile_layers
from mmformer.run.launch import UserError
from tests.helpers import small_model

ROOT = Path(__file__).resolve().parents[2]


def test_the_feed_forward_map_of_every_layer_is_compiled(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    model = small_model()
    compile_layers(model)
    compiled = [part for part in model.modules() if part._compiled_call_impl is not None]
    assert compiled == [part for part in model.modules() if isinstance(part, FeedForward)]
    assert len(compiled) == 3


def test_a_missing_compiler_is_said_before_training(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(UserError, match=r"extras\.compile=true needs a C\+\+ compiler, .* my-compiler, g\+\+, clang"):
        compile_layers(small_model())


STEPS = """
import shutil, torch
from torch import nn
from mmformer.run.compilation import compile_layers
from tests.helpers import random_batch, small_model

compiled = []

def backend(graph, inputs):
    compiled.append(graph)
    return graph.forward

real = nn.Module.compile
nn.Module.compile = lambda part, **given: real(part, backend=backend, **given)
shutil.which = lambda name: name
model = small_model()
compile_layers(model)

def step(size, seed):
    batch = random_batch(size, seed)
    model.fuse(model.encode(batch)).x.sum().backward()

step(14, 0)
assert 0 < len(compiled) <= 3, len(compiled)
torch.compiler.set_stance("fail_on_recompile")
for seed, size in enumerate((14, 9, 3, 27), start=1):
    step(size, seed)
"""


def test_batches_with_other_numbers_of_tokens_compile_nothing_again():
    # in a process without the checks of types that this one has, and that no compiled code has
    done = subprocess.run([sys.executable, "-c", STEPS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
