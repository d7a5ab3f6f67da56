"""From a run to an index and back: the vectors, the fingerprint, and the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmformer
from mmformer.cli import main
from mmformer.datasets.tables import ManifestError
from mmformer.predict import Predictor
from mmformer.search import Index
from mmformer.search.embedding import embed_query, embed_rows, fingerprint
from tests.checkpoints.configs import run_config
from tests.test_predict import save, write_manifest, write_media


def shared_config() -> dict:
    """A classifier that also embeds each modality by a head of its name."""
    config = run_config()
    heads = {name: {"_target_": "mmformer.heads.UnitHead", "dim": 24, "num_outputs": 9} for name in ("text", "image")}
    config["model"]["heads"] |= heads
    return config


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    write_manifest(folder / "rows.csv", write_media(folder))
    save(folder / "run", shared_config())
    return folder


@pytest.fixture(scope="module")
def predictor(place: Path) -> Predictor:
    return mmformer.load(place / "run")


def one_by_one(predictor: Predictor, place: Path, modality: str) -> dict[str, Tensor]:
    rows = predictor.manifest(place / "rows.csv", labelled=False)
    out = {}
    for i in range(len(rows)):
        value = rows.text(i) if modality == "text" else rows.source(modality, i)
        if value is not None:
            out[rows.id(i)] = predictor.embed({modality: value}, modality)
    return out


@pytest.mark.parametrize("modality", ["text", "image", "audio"])
def test_vectors_are_those_of_the_rows_alone(predictor: Predictor, place: Path, modality: str) -> None:
    vectors, rows, faults = embed_rows(predictor, place / "rows.csv", modality)
    wanted = one_by_one(predictor, place, modality)
    assert rows["id"].to_pylist() == list(wanted)
    assert set(rows["modality"].to_pylist()) == {modality}
    assert faults == []
    torch.testing.assert_close(vectors, torch.stack(list(wanted.values())), atol=1e-5, rtol=1e-5)


def test_a_whole_sample_is_fused(predictor: Predictor, place: Path) -> None:
    vectors, rows, _ = embed_rows(predictor, place / "rows.csv", "fused")
    torch.testing.assert_close(vectors, predictor.embed(place / "rows.csv"), atol=1e-5, rtol=1e-5)
    assert rows.column_names == ["id", "modality", "split", "text", "image", "audio", "label"]
    query = embed_query(predictor, {"text": "what, 0?"}, fused=True)
    torch.testing.assert_close(query, vectors[0], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_read_is_told_and_left_out(predictor: Predictor, place: Path, tmp_path: Path) -> None:
    for name in ("1.png", "8.png"):
        shutil.copy(place / name, tmp_path)
    (tmp_path / "8.png").write_bytes(b"no picture")
    rows = [{"id": "a", "image": "1.png"}, {"id": "b", "image": "8.png"}, {"id": "c", "text": "no picture"}]
    vectors, table, faults = embed_rows(predictor, write_manifest(tmp_path / "rows.csv", rows), "image")
    assert table["id"].to_pylist() == ["a"]
    assert len(vectors) == 1
    assert len(faults) == 1
    assert faults[0].startswith("b: image 8.png: ")
    with pytest.raises(ManifestError, match="no column for 'image'"):
        embed_rows(predictor, write_manifest(tmp_path / "rows.csv", rows[2:]), "image")
    with pytest.raises(ValueError, match=r"no row has a readable image: b: image 8\.png"):
        embed_rows(predictor, write_manifest(tmp_path / "rows.csv", rows[1:2]), "image")
    with pytest.raises(ValueError, match="no modality 'video': this model has text, image, audio"):
        embed_rows(predictor, place / "rows.csv", "video")


def test_a_fingerprint_tells_models_and_spaces_apart(predictor: Predictor, place: Path, tmp_path: Path) -> None:
    shared = fingerprint(predictor, ["text", "image"])
    assert shared == fingerprint(mmformer.load(place / "run"), ["image"])
    assert len({shared, fingerprint(predictor, ["audio"]), fingerprint(predictor, ["fused"])}) == 3
    other = mmformer.load(save(tmp_path / "run", shared_config()))
    with torch.no_grad():
        other.model.heads["text"].out.weight[0, 0] += 1e-3
    assert fingerprint(other, ["text"]) != shared
    with pytest.raises(ValueError, match="vectors of text, audio cannot be compared: this model has heads for image, "):
        fingerprint(predictor, ["text", "audio"])


def run(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


def search(capsys, *words) -> list[dict]:
    code, out, errors = run(capsys, "search", *words, "--json")
    assert code == 0, errors
    return json.loads(out)


def test_index_and_search(place: Path, tmp_path: Path, capsys) -> None:
    idx = tmp_path / "idx"
    both = ("--modality", "text", "--modality", "image")
    code, _, errors = run(capsys, "index", place / "run", place / "rows.csv", "-o", idx, *both)
    assert code == 0, errors
    assert errors.splitlines() == ["text: 12 rows", "image: 12 rows", f"24 vectors of 9 in {idx}"]
    found = search(capsys, idx, "--image", place / "6.png", "--top", 3)
    assert (found[0]["id"], found[0]["modality"], found[0]["label"]) == ("r6", "image", "goat")
    assert found[0]["score"] == pytest.approx(1, abs=1e-5)
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)
    kept = search(capsys, idx, "--image", place / "6.png", "--filter", "modality=text", "--filter", "label=goat",
                  "--filter", "label=dog")  # fmt: skip
    assert {(hit["modality"], hit["label"]) for hit in kept} == {("text", "goat"), ("text", "dog")}
    mixed = search(capsys, idx, "--image", place / "6.png", "--text", "what, 6?", "--top", 24)
    predictor = mmformer.load(place / "run")
    query = embed_query(predictor, {"text": "what, 6?", "image": place / "6.png"})
    wanted = Index.load(idx).search(query[None], 24, model=fingerprint(predictor, ["text", "image"]))[0]
    assert [hit["id"] for hit in mixed] == [hit.id for hit in wanted]


def test_search_prints_lines(place: Path, tmp_path: Path, capsys) -> None:
    idx = tmp_path / "idx"
    run(capsys, "index", place / "run", place / "rows.csv", "-o", idx, "--modality", "text")
    code, out, _ = run(capsys, "search", idx, "--text", "what, 3?", "--top", 2)
    assert code == 0
    first, second = out.splitlines()
    assert first.split()[:3] == ["1.0000", "r3", "text"]
    assert "label=dog" in first
    assert float(second.split()[0]) < 1
    code, out, errors = run(capsys, "search", idx, "--text", "what", "--filter", "label=horse")
    assert (code, out, errors) == (0, "", "no row is left by the filters\n")


def test_rows_are_added_to_an_index(place: Path, tmp_path: Path, capsys) -> None:
    idx, more = tmp_path / "idx", write_manifest(tmp_path / "more.csv", [{"id": "new", "text": "something else"}])
    run(capsys, "index", place / "run", place / "rows.csv", "-o", idx, "--modality", "text", "--half")
    code, _, errors = run(capsys, "index", place / "run", more, "-o", idx)
    assert code == 2
    assert errors == f"mmformer: error: {idx} is an index already: add to it with --add, or name another folder\n"
    code, _, errors = run(capsys, "index", place / "run", more, "-o", idx, "--add")
    assert (code, errors.splitlines()[-1]) == (0, f"13 vectors of 9 in {idx}")
    assert search(capsys, idx, "--text", "something else", "--top", 1)[0]["id"] == "new"
    code, _, errors = run(capsys, "index", place / "run", more, "-o", idx, "--add")
    assert code == 2
    assert "in the index already, such as id 'new' (text)" in errors


def test_the_command_line_says_what_is_wrong(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    idx = tmp_path / "idx"
    run(capsys, "index", place / "run", place / "rows.csv", "-o", idx, "--modality", "text")
    moved = shutil.copytree(place, tmp_path / "moved")
    other = save(tmp_path / "other", run_config())
    cases = {
        ("search", idx): "nothing to search for: give any of --text, --image, --audio",
        ("search", idx, "--audio", place / "6.wav"): ":shared, these are of ",
        ("search", idx, "--text", "x", "--run", other): ":shared, these are of ",
        ("search", idx, "--text", "x", "--filter", "label"): "--filter label: write it as NAME=VALUE",
        ("search", tmp_path / "none", "--text", "x"): "is no index: it has no manifest.json",
        ("index", other, place / "rows.csv", "-o", tmp_path / "b"): "vectors of text, image, audio cannot be compared",
        ("index", place / "run", place / "rows.csv", "-o", tmp_path / "b", "--add"): "is no index yet: leave --add out",
        ("index", place / "run", place / "rows.csv", "-o", tmp_path / "b", "--modality", "text", "--modality",
         "fused"): "--modality fused has a space of its own",
    }  # fmt: skip
    for words, message in cases.items():
        code, _, errors = run(capsys, *words)
        assert code == 2, errors
        assert message in errors
    shutil.copytree(idx, moved / "deep" / "idx")
    code, _, errors = run(capsys, "search", moved / "deep" / "idx", "--text", "x")
    assert code == 2
    assert "which is not there: say where it lies with --run" in errors
    assert search(capsys, moved / "deep" / "idx", "--text", "what, 3?", "--run", moved / "run")[0]["id"] == "r3"
