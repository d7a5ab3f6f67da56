from pathlib import Path

import numpy as np
import pytest
import torch

import mmformer
from mmformer.cli.bench import table
from mmformer.compress import measure as measuring
from mmformer.compress.costs import operations
from mmformer.compress.measure import Measured, Rows, Times, data_of, judge, measure, rows_to_judge
from mmformer.compress.opened import OpenedRun, open_any
from mmformer.compress.peak import peak_memory
from mmformer.compress.stages import Prune, Work
from mmformer.predict import load
from tests.checkpoints.configs import run_config
from tests.test_predict import save, write_manifest, write_media


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("measure")
    write_manifest(folder / "rows.csv", write_media(folder))
    save(folder / "run", run_config())
    return folder


def test_a_run_and_what_is_cut_from_it_are_judged_on_the_same_rows(place):
    work = Work(run=place / "run", data=place / "rows.csv", tell=lambda line: None)
    cut = Prune(share=0.9, samples=8, batch_size=4)(work, place / "run", place / "cut")
    rows = rows_to_judge(load(place / "run"), place / "rows.csv", None)
    one, other = measure([open_any(place / "run"), open_any(cut)], rows, 2, memory=False)
    assert one.metric == other.metric == "acc"
    for path, found in ((place / "run", one), (cut, other)):
        wanted = mmformer.load(path).evaluate(place / "rows.csv", None)
        named = {f"acc{k and '_' + k}": v for k, v in found.accuracy.items()}
        assert named == pytest.approx({k: v for k, v in wanted.items() if k.startswith("acc")})
    assert one.difference == 0
    assert other.difference > 0
    assert other.size < one.size
    assert other.parameters < one.parameters
    assert other.operations / one.operations == pytest.approx(0.9, abs=0.06)
    assert set(one.times) == {1, 8}
    assert one.times[8].throughput == pytest.approx(8e3 / one.times[8].p50)
    assert one.times[1].p50 <= one.times[1].p95
    shown = table([one, other])
    assert len({len(line) for line in shown.splitlines()}) == 1
    assert "acc" in shown


def test_operations_are_those_of_one_sample_with_all_modalities(place):
    rows = rows_to_judge(load(place / "run"), place / "rows.csv", None)
    run = open_any(place / "run")
    full = rows.having(("text", "image", "audio"))[0]
    assert len(full) == 3
    assert all(set(sample) == {"text", "image", "audio"} for sample in full)
    assert run.operations(full) == operations(run.predictor.model, run._batch(full))


def test_memory_is_that_of_a_process_of_its_own(place):
    sample = {"text": "what?", "image": place / "6.png", "id": "x"}
    assert 5e7 < peak_memory(place / "run", sample) < 3e9
    with pytest.raises(RuntimeError, match="could not be opened in a process of its own"):
        peak_memory(place / "nowhere.onnx", sample)


def test_times_are_taken_in_turns(monkeypatch, place):
    order: list[int] = []

    class Counting(OpenedRun):
        def __init__(self, number):
            super().__init__(place / "run", shared)
            self.number = number

        def step(self, samples):
            return lambda: order.append(self.number)

    shared = load(place / "run")
    monkeypatch.setattr(measuring, "VARIETY", 2)
    measuring._times([Counting(0), Counting(1)], [{"text": "a"}], 1, 4)
    assert order == [0, 0, 1, 1] + [0, 1, 1, 0] * 2


def test_embeddings_are_judged_by_finding_their_partners():
    vectors = np.eye(12, dtype=np.float32)
    good = {"text_embedding": vectors, "image_embedding": vectors.copy()}
    assert judge(good, None, None) == 1
    bad = {"text_embedding": vectors, "image_embedding": -vectors}
    assert judge(bad, None, None) == 0
    good["image_embedding"][6:] = np.nan
    assert judge(good, None, None) == 1
    assert np.isnan(judge({"text_embedding": vectors}, None, None))


def test_labels_and_numbers_have_their_own_measure():
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert judge({"logits": np.array([[2.0, -1], [-1, 2]], np.float32)}, target, "Labels") == pytest.approx(1)
    known = torch.tensor([1.0, float("nan"), 3.0])
    assert judge({"value": np.array([2.0, 9, 3], np.float32)}, known, "Number") == pytest.approx(0.5)
    assert judge({"logits": np.eye(3, dtype=np.float32)}, torch.tensor([0, 2, -100]), "Classes") == 0.5


def test_mistakes_are_named(place):
    with pytest.raises(ValueError, match="0 things to measure"):
        measure([], Rows(samples=[{"text": "a"}], target=None, kind=None, modalities=("text",)))
    with pytest.raises(FileNotFoundError, match="it does not say what its data are: give rows"):
        data_of(place / "run")
    (place / "other").mkdir(exist_ok=True)
    (place / "other" / "config.yaml").write_text("data: {path: gone.csv}\npaths: {root: /nowhere}\n")
    with pytest.raises(FileNotFoundError, match=r"its data, gone\.csv, are not there"):
        data_of(place / "other")


def test_figures_are_plain():
    times = Times(p50=1.0, p95=2.0, throughput=1000.0)
    made = Measured(name="a", size=1, parameters=None, operations=None, times={1: times}, memory=None,
                    metric="acc", accuracy={"": 0.5}, difference=None).plain()  # fmt: skip
    assert made["times"]["1"]["p95"] == 2.0
