"""Texts that a model writes are judged beside the right references, and it never sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

import mmformer
from mmformer.batch import Batch
from mmformer.datasets.tables import ManifestError
from mmformer.evaluate import Written, answers, captions, evaluate, transcripts, written
from mmformer.metrics.text import cider_d, words
from mmformer.predict import Predictor
from tests.checkpoints.configs import run_config
from tests.test_predict import save, write_manifest, write_media


@dataclass
class Told:
    """In place of a model's writing: texts by the id of the sample, and what it was shown."""

    texts: dict[str, str]
    seen: dict[str, frozenset[str]] = field(default_factory=dict)
    writer: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(modality="text"))

    def prompted(self, batch: Batch) -> Batch:
        return batch

    def limits(self, max_length: int) -> int:
        return max_length

    def write(self, batch: Batch, limits: int, search: object) -> list[list[str]]:
        self.seen |= dict(zip(batch.ids, batch.present(), strict=True))
        return [[self.texts[id]] for id in batch.ids]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    return mmformer.load(save(tmp_path_factory.mktemp("written") / "run", run_config()))


def told(monkeypatch: pytest.MonkeyPatch, **texts: str) -> Told:
    writing = Told(texts)
    monkeypatch.setattr(written.Writing, "of", lambda *_: writing)
    return writing


def table(folder: Path, rows: list[dict[str, str]]) -> Path:
    write_media(folder, 3)
    return write_manifest(folder / "rows.csv", [{"split": "test"} | row for row in rows])


def test_a_picture_is_written_about_once_beside_all_its_captions(predictor, tmp_path, monkeypatch) -> None:
    writing = told(monkeypatch, a="A red house", c="two dogs run", e="nothing")
    rows = table(tmp_path, [
        {"id": "a", "image": "0.png", "text": "A house"},
        {"id": "b", "image": "0.png", "text": "the red house|One red house."},
        {"id": "c", "image": "1.png", "text": "dogs run fast"},
        {"id": "d", "image": "2.png"},
        {"id": "e", "text": "no picture at all"},
    ])  # fmt: skip
    found = evaluate(predictor, rows, Written(captions), resamples=10)
    assert writing.seen == {"a": {"image"}, "c": {"image"}}
    references = [["A house", "the red house", "One red house."], ["dogs run fast"]]
    wanted = cider_d(
        [words("A red house"), words("two dogs run")], [[words(text) for text in texts] for texts in references]
    )
    assert found.metrics["cider_d"].value == pytest.approx(sum(wanted) / 2)
    assert found.headline == "cider_d"
    assert set(found.metrics) == {"cider_d", "bleu4", "rouge_l"}


def test_speech_is_judged_over_the_corpus(predictor, tmp_path, monkeypatch) -> None:
    told(monkeypatch, a="one two", b="tree")
    rows = table(tmp_path, [
        {"id": "a", "audio": "0.wav", "text": "one two four"}, {"id": "b", "audio": "1.wav", "text": "three"},
    ])  # fmt: skip
    found = evaluate(predictor, rows, Written(transcripts), resamples=10).metrics
    assert found["wer"].value == 2 / 4
    assert found["cer"].value == pytest.approx((5 + 1) / (12 + 5))


def test_an_answer_is_judged_beside_all_people(predictor, tmp_path, monkeypatch) -> None:
    writing = told(monkeypatch, a="Two.", b="no")
    write_media(tmp_path, 3)
    rows = tmp_path / "rows.csv"
    rows.write_text(
        "id,split,image,text,answer\n"
        f"a,test,0.png,how many?,{'|'.join(['2'] * 2 + ['three'] * 8)}\n"
        f"b,test,0.png,is it?,{'|'.join(['no'] * 10)}\n"
    )
    found = evaluate(predictor, rows, Written(answers, "answer", prompted=True), resamples=10).metrics
    assert writing.seen == {"a": {"image", "text"}, "b": {"image", "text"}}
    assert found["vqa_acc"].value == pytest.approx((0.6 + 1) / 2)
    assert found["exact"].value == 0.5
    rows.write_text("id,split,image,text,answer\na,test,0.png,how many?,2\n")
    assert list(evaluate(predictor, rows, Written(answers, "answer", prompted=True)).metrics) == ["exact"]
    with pytest.raises(
        ManifestError, match="has no column 'reply' of references; it has id, split, image, text, answer"
    ):
        evaluate(predictor, rows, Written(answers, "reply", prompted=True))


def test_a_model_that_writes_nothing_says_so(predictor, tmp_path) -> None:
    rows = table(tmp_path, [{"id": "a", "image": "0.png", "text": "A house"}])
    with pytest.raises(ValueError, match="which writes no texts"):
        evaluate(predictor, rows, Written(captions))
