"""Approximate nearest neighbours: an inverted file of 8-bit codes, searched by faiss.

Vectors are sorted into lists by their nearest centroid, and a query reads the few lists whose centroids are nearest to
it. What that finds is scored again with the vectors themselves. The lists are kept as plain tensors: nothing of faiss'
own format is ever read from a disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmformer.search.nearest import Block, Found

PROBES = 64
"""Lists that a query reads."""
_PER_LIST = 39
"""Training vectors for each centroid below which faiss warns."""
_TRAINING = 64


def faiss() -> Any:
    """The library, on as many threads as torch has.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        import faiss as library
    except ImportError as error:
        raise ImportError("approximate search needs faiss: pip install 'mmformer[search]'") from error
    library.omp_set_num_threads(torch.get_num_threads())
    return library


def lists_for(count: int) -> int:
    """How many lists serve so many vectors: about 4 sqrt(N), a power of two, and few enough to be trained."""
    wanted = min(4 * count**0.5, count / _PER_LIST)
    return 1 << max(0, int(wanted).bit_length() - 1)


class Inverted:
    """The lists of the rows 0 to `count` - 1 of an index; it does not change."""

    def __init__(self, lists: Any, count: int):
        self._lists, self.count = lists, count

    @classmethod
    def build(cls, sample: Float[Tensor, "S D"], blocks: Iterable[Block], num_lists: int) -> Inverted:
        """Find the centroids of a sample of the vectors, and sort all blocks into their lists.

        Raises:
            ImportError: faiss is not installed.
        """
        library = faiss()
        index = library.index_factory(sample.shape[1], f"IVF{num_lists},SQ8", library.METRIC_INNER_PRODUCT)
        index.train(sample.float().numpy())
        for numbers, vectors in blocks:
            index.add_with_ids(vectors.float().numpy(), numbers.numpy())
        return cls(index, index.ntotal)

    def search(
        self,
        queries: Float[Tensor, "Q D"],
        k: int,
        probes: int = PROBES,
        selected: Bool[np.ndarray, " N"] | None = None,
    ) -> Found:
        """About the k nearest rows among those that are `selected`, with scores of their codes."""
        library = faiss()
        settings: dict[str, Any] = {"nprobe": min(probes, self._lists.nlist)}
        if selected is not None:
            bits = np.packbits(selected[: self.count], bitorder="little")
            settings["sel"] = library.IDSelectorBitmap(self.count, library.swig_ptr(bits))
        found = self._lists.search(queries.numpy(), k, params=library.SearchParametersIVF(**settings))
        return Found(rows=torch.from_numpy(found[1]), scores=torch.from_numpy(found[0]))

    def without(self, removed: Bool[np.ndarray, " N"]) -> Inverted:
        """The lists without some rows, the others numbered anew in their order."""
        tensors = self.tensors()
        gone = torch.from_numpy(removed[: self.count])
        new = (~gone).cumsum(0) - 1
        kept = ~gone[tensors["rows"]]
        owner = torch.repeat_interleave(tensors["sizes"])[kept]
        sizes = torch.bincount(owner, minlength=len(tensors["sizes"]))
        rows = new[tensors["rows"][kept]]
        return Inverted.of(tensors | {"rows": rows, "codes": tensors["codes"][kept], "sizes": sizes})

    def tensors(self) -> dict[str, Tensor]:
        """Centroids, the range of the codes, and of all lists end to end: their sizes, row numbers and codes."""
        library, lists = faiss(), self._lists.invlists
        sizes = [lists.list_size(i) for i in range(lists.nlist)]
        codes = np.empty((sum(sizes), lists.code_size), dtype=np.uint8)
        rows = np.empty(sum(sizes), dtype=np.int64)
        start = 0
        for i, size in enumerate(sizes):
            if size:
                part = slice(start, start := start + size)
                codes[part] = library.rev_swig_ptr(lists.get_codes(i), size * lists.code_size).reshape(size, -1)
                rows[part] = library.rev_swig_ptr(lists.get_ids(i), size)
        return {
            "centroids": torch.from_numpy(self._lists.quantizer.reconstruct_n(0, self._lists.nlist)),
            "range": torch.from_numpy(library.vector_to_array(self._lists.sq.trained)),
            "sizes": torch.tensor(sizes),
            "rows": torch.from_numpy(rows),
            "codes": torch.from_numpy(codes),
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Inverted:
        """The lists that `tensors` wrote.

        Raises:
            ImportError: faiss is not installed.
            ValueError: the tensors do not belong together.
        """
        library = faiss()
        centroids, rows, codes = tensors["centroids"], tensors["rows"], tensors["codes"]
        count, dim = len(rows), centroids.shape[1]
        fits = (len(tensors["sizes"]) == len(centroids), len(tensors["range"]) == 2 * dim)
        whole = (int(tensors["sizes"].sum()) == count, codes.shape == (count, dim))
        if not all((*fits, *whole)) or (count and not 0 <= int(rows.min()) <= int(rows.max()) < count):
            raise ValueError(f"lists of {count} rows whose tensors do not fit one another: build them again")
        coarse = library.IndexFlatIP(dim)
        coarse.add(centroids.numpy())
        kind = library.ScalarQuantizer.QT_8bit
        index = library.IndexIVFScalarQuantizer(coarse, dim, len(centroids), kind, library.METRIC_INNER_PRODUCT)
        index.own_fields, _ = True, coarse.this.disown()  # the lists free the centroids
        library.copy_array_to_vector(tensors["range"].numpy(), index.sq.trained)
        index.is_trained, start = True, 0
        for i, size in enumerate(tensors["sizes"].tolist()):
            part = slice(start, start := start + size)
            own_rows, own_codes = rows[part].contiguous().numpy(), codes[part].contiguous().numpy()
            index.invlists.add_entries(i, size, library.swig_ptr(own_rows), library.swig_ptr(own_codes.reshape(-1)))
        index.ntotal = count
        return cls(index, count)


def training_size(num_lists: int) -> int:
    """How many vectors the centroids are found from."""
    return _TRAINING * num_lists
