"""An index of a trained model, as a table that the device searches with what one of its towers embeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmformer.export.index import to_table, write_table
from mmformer.predict import load
from mmformer.runtime import Table
from mmformer.search import Index
from mmformer.search.embedding import fingerprint
from tests.checkpoints.configs import run_config
from tests.test_predict import save


def test_the_table_holds_what_the_index_holds(tmp_path: Path):
    predictor = load(save(tmp_path / "run", run_config(dim=12)))
    texts = [{"text": f"text {i}"} for i in range(9)]
    vectors = predictor.embed(texts, "text")
    index = Index.build(vectors[:6], {"id": list("abcdef")}, model=fingerprint(predictor, ["text"]))
    index = index.add(vectors[6:], {"id": list("ghi")}, model=index.model)
    index.save(tmp_path / "index")
    table = Table.load(write_table(tmp_path / "index", predictor, "text", tmp_path / "table.npz"))
    assert table.vectors.dtype == np.float16
    assert [table.search(vector, 1)[0].id for vector in vectors.numpy()] == list("abcdefghi")
    with pytest.raises(ValueError, match=r"image of this run is in .*:image: index with this run"):
        to_table(index, predictor, "image")
