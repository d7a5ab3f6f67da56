"""Tensors by name that are read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class RefusedFile(ValueError):
    """A file that is damaged, that is not what it says, or that could run code; nothing of it was used."""


@dataclass(frozen=True)
class Entry:
    """A tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class TensorStore(Mapping):  # not Mapping[str, Tensor]: a check of types at run time would read a tensor
    """Tensors by name, read when asked for: `store[name]`; shapes and types are known without."""

    def __init__(self, entries: Mapping[str, Entry]):
        self.entries = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> TensorStore:
        """A store of tensors that are in memory, or mapped into it."""
        return cls({n: Entry(tuple(t.shape), t.dtype, lambda t=t: t.detach()) for n, t in tensors.items()})

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor's numbers, without reading it."""
        return self.entries[name].dtype

    def without_prefix(self, prefix: str) -> TensorStore:
        """The tensors whose names start with `prefix`, named by the rest."""
        return TensorStore({n.removeprefix(prefix): entry for n, entry in self.entries.items() if n.startswith(prefix)})

    def unwrapped(self) -> TensorStore:
        """Without the names that wrappers add: `module.` where it stands before all, `_orig_mod.` (torch.compile)."""
        store = TensorStore({name.replace("_orig_mod.", ""): entry for name, entry in self.entries.items()})
        if len(store) != len(self):
            raise RefusedFile("names that are equal without torch.compile's _orig_mod.: the file holds two models")
        while store and all(name.startswith("module.") for name in store):
            store = store.without_prefix("module.")
        return store

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)
