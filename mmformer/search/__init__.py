"""An index over embeddings of any modality: build it, search it, add to it, keep it on disk.

`mmformer.search.embedding` makes the vectors with a trained model.
"""

from mmformer.search.index import Hit, Index, Rerank
from mmformer.search.nearest import average

__all__ = ["Hit", "Index", "Rerank", "average"]
