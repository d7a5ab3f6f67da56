"""The first hits in the order of what the matching head says of each pair, the others behind them as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mmformer
from mmformer.cli import main
from mmformer.predict import Predictor
from mmformer.search import Index
from mmformer.search.embedding import embed_query, embed_rows, fingerprint
from mmformer.search.matching import by_matching
from tests.checkpoints.configs import run_config
from tests.search.test_embedding import shared_config
from tests.test_predict import save, write_manifest, write_media

SHARE, QUERY = 0.5, {"text": "what, 7?"}


def matching_config() -> dict:
    """A model that embeds texts and pictures, and judges pairs of them."""
    config = shared_config()
    config["model"]["heads"]["match"] = {"_target_": "mmformer.heads.Head", "dim": 24, "num_outputs": 2}
    config["objectives"]["match"] = {
        "_target_": "mmformer.objectives.Matching", "modalities": ["text", "image"], "head": "match",
        "weighting": None, "top": 4, "share": SHARE,
    }  # fmt: skip
    return config


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("matching")
    write_manifest(folder / "rows.csv", write_media(folder))
    save(folder / "run", matching_config())
    save(folder / "other", run_config())
    return folder


@pytest.fixture(scope="module")
def predictor(place: Path) -> Predictor:
    return mmformer.load(place / "run")


def judged(predictor: Predictor, path: Path) -> float:
    """The logit of a match between the query and a picture."""
    (_, batch), *_ = predictor._batches([{**QUERY, "image": path}], strict=True)
    with torch.no_grad():
        return float(predictor.model.output(predictor.model.encode(batch), "match")[0][0, 1])


def test_the_first_hits_are_judged_and_the_others_follow(place, predictor):
    vectors, rows, _ = embed_rows(predictor, place / "rows.csv", "image")
    made_by = fingerprint(predictor, ["text", "image"])
    index = Index.build(vectors, rows, model=made_by)
    query = embed_query(predictor, QUERY)[None]
    (plain,) = index.search(query, 9, model=made_by)
    predictor.batch_size = 3
    rerank = by_matching(predictor, QUERY, [place / "rows.csv"])
    (found,) = index.search(query, 9, model=made_by, rerank=rerank, depth=5)
    wanted = {hit.id: judged(predictor, place / f"{hit.id[1:]}.png") + SHARE * hit.score for hit in plain[:5]}
    assert [hit.id for hit in found[:5]] == sorted(wanted, key=lambda id: -wanted[id])
    assert [hit.score for hit in found[:5]] == pytest.approx(sorted(wanted.values(), reverse=True), abs=1e-5)
    assert found[5:] == plain[5:]
    assert [hit.id for hit in found] != [hit.id for hit in plain]
    with pytest.raises(ValueError, match=r"hit 'r\d+' is not in no manifest"):
        index.search(query, 3, model=made_by, rerank=by_matching(predictor, QUERY, []), depth=5)
    picture = by_matching(predictor, {"image": place / "1.png"}, [place / "rows.csv"])
    with pytest.raises(ValueError, match="is of modality 'image', and this model judges image beside text"):
        index.search(query, 3, model=made_by, rerank=picture, depth=5)


def run(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    said = capsys.readouterr()
    return int(caught.value.code or 0), said.out, said.err


def test_the_command_ranks_anew_and_says_what_is_wrong(place, tmp_path, capsys):
    idx, query = tmp_path / "idx", ["--text", QUERY["text"]]
    both = ["--modality", "text", "--modality", "image"]
    assert run(capsys, "index", place / "run", place / "rows.csv", "-o", idx, *both)[0] == 0
    again = [*query, "--rerank", 5, "--rows", place / "rows.csv", "--top", 3, "--json"]
    code, out, errors = run(capsys, "search", idx, *again)
    assert code == 0, errors
    hits = json.loads(out)
    assert {hit["modality"] for hit in hits} == {"image"}
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    cases = {
        ("--rerank", 5): "name the manifest that was indexed with --rows",
        ("--rerank", 5, "--image", place / "1.png"): "a query is one thing: this one has text and image",
        ("--rerank", 5, "--rows", place / "rows.csv", "--run", place / "other"): "judges no pairs: take a run with",
    }
    for given, message in cases.items():
        code, _, errors = run(capsys, "search", idx, *query, *given)
        assert code == 2
        assert message in errors
