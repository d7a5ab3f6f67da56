from __future__ import annotations

import shutil

import pytest

from mmformer.nn import FeedForward
from mmformer.run.compilation import compile_layers
from mmformer.run.launch import UserError
from tests.helpers import small_model


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
