"""`extras.compile=true`: compiled code where it can be shared by all batches."""

from __future__ import annotations

import os
import shutil

from torch import nn

from mmformer.nn import FeedForward
from mmformer.run.launch import UserError


def compile_layers(model: nn.Module) -> None:
    """Compile the feed-forward map of every layer, for rows of any length; layers of one width share the code.

    Only what is a function of tensors is compiled. How a packed row is cut up for attention is arithmetic in Python
    that no two batches have in common: compiled, it would be compiled again for each of them.

    Raises:
        UserError: there is no C++ compiler, which torch.compile calls.
    """
    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if not any(map(shutil.which, compilers)):
        raise UserError(f"extras.compile=true needs a C++ compiler, and there is none of {', '.join(compilers)}")
    for part in model.modules():
        if isinstance(part, FeedForward):
            part.compile(dynamic=True)
