from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmformer.report import Answers, write_predictions, write_report
from mmformer.report.predictions import Texts
from mmformer.report.retrieval import Retrieved
from tests.report.runs import STARTED, picture_file, sound_file, write_run

VOID = {"meta", "img", "br", "line", "rect", "circle"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects addresses and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += f"{data}\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "runs" / "digits" / "now")


@pytest.fixture(scope="module")
def text(run) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_the_page_asks_nothing_of_a_network(text):
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\(", text)
    assert len(text) < 5_000_000


def test_the_page_says_what_a_reader_asks(text):
    said = Page(text).text
    for wanted in [
        "digits", "python train.py experiment=digits trainer.max_epochs=20", "guessing", "always “yes”", "1,204,321",
        "1 min 33 s", "learning rate", "text + image", "kind", "voice 3", "Most frequent confusions", "Worst errors",
        "text + audio", "17 cells could not be read", "truncated PNG: 812 of 1,024 bytes", "expected calibration error",
    ]:  # fmt: skip
        assert wanted in said, wanted
    assert re.search(r"95\u2009% interval 9\d\.\d", said)
    assert f"started\n{STARTED.astimezone().isoformat()}" in said


def test_text_of_the_data_is_shown_and_never_markup(text):
    assert "&lt;picture&gt; &amp; the sound?" in text
    assert "<picture>" not in text


def test_the_worst_errors_are_those_of_the_largest_loss(run, text):
    from mmformer.report import read_predictions

    said = read_predictions(run)
    assert said is not None
    loss, scores = np.array(said.column("loss")), said.scores()
    wrong = np.flatnonzero(scores == 0)
    worst = wrong[np.argsort(-loss[wrong], kind="stable")][:12]
    ids = re.findall(r'class="id">(test-\d+)', text)
    assert ids == [said.column("id")[i] for i in worst]
    cards = text.split('<article class="card">')[1:]
    assert len(cards) == len(worst)
    for card, i in zip(cards, worst, strict=True):
        assert ("<img" in card) == (said.column("image")[i] is not None)
        assert ("<audio" in card) == (said.column("audio")[i] is not None)


def change(run: Path, folder: Path, name: str, content: str | None) -> Path:
    """A copy of a run with one file replaced or removed."""
    folder.mkdir()
    for path in run.iterdir():
        if path.is_file() and path.name != name:
            (folder / path.name).write_bytes(path.read_bytes())
    if content is not None:
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("predictions.parquet", "Worst errors"),
        ("metrics.csv", "Training"),
        ("metrics.json", "By subset"),
        ("run.json", "python train.py"),
        ("data_errors.jsonl", "Faults"),
        ("config.yaml", "Configuration"),
    ],
)
def test_a_missing_file_costs_its_own_section_only(run, tmp_path, name, gone):
    said = Page(write_report(change(run, tmp_path / "digits", name, None)).read_text()).text
    assert gone not in said
    for other in {"Worst errors", "Training", "By subset", "Faults", "Configuration"} - {gone}:
        assert other in said, other


def test_media_that_are_gone_are_named(run, tmp_path):
    def gone(row, column):
        if column == "image":
            raise FileNotFoundError(2, "No such file", row[column])
        return b"no sound"

    copy = change(run, tmp_path / "digits", "report.html", None)
    said = Page(write_report(copy, gone).read_text()).text
    assert "image not shown: [Errno 2] No such file" in said
    assert "audio not shown: not a readable sound" in said


def test_media_stop_where_the_page_would_grow_too_large(run, tmp_path):
    import io

    import soundfile

    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(0).normal(size=60 * 16000) / 5, 16000, format="WAV")
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8)).save(noise, "PNG")
    copy = change(run, tmp_path / "digits", "report.html", None)
    page = write_report(copy, lambda row, column: out.getvalue() if column == "audio" else noise.getvalue())
    assert page.stat().st_size < 5_000_000
    assert "audio not shown, to keep this page small" in page.read_text()


def test_no_error_shows_the_hardest_samples(tmp_path):
    outputs = np.eye(3)[[0, 1, 2, 0]] * 5
    answers = Answers(ids=("a", "b", "c", "d"), outputs=outputs, targets=np.array([0, 1, 2, 0]))
    write_predictions(tmp_path, {"": answers}, ["x", "y", "z"])
    (tmp_path / "metrics.json").write_text(json.dumps({"test/acc": 1.0}))
    said = Page(write_report(tmp_path).read_text()).text
    assert "Hardest samples" in said
    assert "No answer was wrong: the 4 right ones" in said


def test_a_regression_and_several_labels_have_a_report(tmp_path):
    random = np.random.default_rng(0)
    values = random.normal(size=50)
    wild = Answers(ids=tuple(map(str, range(50))), outputs=values, targets=values + random.normal(size=50) / 9)
    rows = {str(i): {"place": f"<{i % 3}>"} for i in range(50)}
    write_predictions(tmp_path / "number", {"": wild}, rows=rows)
    error = float(np.abs(wild.outputs - wild.targets).mean())
    (tmp_path / "number" / "metrics.json").write_text(json.dumps({"test/mae": error, "test/r2": 0.9, "test/mae_t": 1}))
    said = Page(write_report(tmp_path / "number").read_text()).text
    assert "mean absolute error, test (95\u2009% interval" in said
    assert "Mean absolute error by group" in said
    assert "the 12 samples with the largest error" in said.lower()
    several = Answers(ids=("a", "b"), outputs=np.array([[1.0, -1], [1, 1]]), targets=np.array([[1.0, 0], [0, 0]]))
    write_predictions(tmp_path / "labels", {"": several}, ["x", "y"])
    (tmp_path / "labels" / "metrics.json").write_text(json.dumps({"test/map": 0.7, "test/f1": 0.5}))
    said = Page(write_report(tmp_path / "labels").read_text()).text
    assert "mean average precision" in said
    assert "none" in said


def retrieved(query: str, key: str, ranks: list[float]) -> Retrieved:
    """A retrieval among as many samples, whose queries find first what comes after them, or themselves."""
    count = len(ranks)
    best = np.array([[(i + (rank > 1) + k) % count for k in range(3)] for i, rank in enumerate(ranks)])
    scores = np.tile([0.9, 0.5, 0.25], (count, 1))
    ids = tuple(f"s{i}" for i in range(count))
    return Retrieved(query=query, key=key, ids=ids, ranks=np.array(ranks), best=best, scores=scores)


def test_a_retrieval_shows_recalls_beside_chance_and_what_was_found(tmp_path):
    both = {"t2i": retrieved("text", "image", [1.0] * 10 + [7.0] * 30), "i2t": retrieved("image", "text", [2.0] * 40)}
    (tmp_path / "0.png").write_bytes(picture_file(3))
    rows = {f"s{i}": {"text": f"word {i}", "image": str(tmp_path / "0.png"), "style": "ab"[i % 2]} for i in range(40)}
    write_predictions(tmp_path, {}, rows=rows, retrieved=both)
    metrics = {"r@1": 0.125, "r@5": 0.625, "r@10": 1.0, "mean_recall": 0.58, "t2i_r@1": 0.25, "loss": 2.0}
    (tmp_path / "metrics.json").write_text(json.dumps({f"test/{name}": value for name, value in metrics.items()}))
    (tmp_path / "metrics.csv").write_text("step,val/t2i_r@1,val/i2t_r@1\n1,0.1,0.2\n2,0.3,0.4\n")
    text = write_report(tmp_path).read_text()
    said = Page(text).text
    assert "12.5\u2009%\nrecall at 1, test" in said
    assert "2.5\u2009%\nby chance, at 1" in said  # 1 of 40
    assert "text \u2192 image\n40\n25.0\u2009%\n25.0\u2009%\n100.0\u2009%\n7\n" in said
    assert "image \u2192 text\n40\n0.0\u2009%\n100.0\u2009%\n100.0\u2009%\n2\n" in said
    assert "by chance\n40\n2.5\u2009%\n12.5\u2009%\n25.0\u2009%\n20.5\n" in said
    assert "recall at 1 by direction" in said
    assert "Recall at 1 by group" in said
    first, second = text.split('<div class="gallery">')[1:]
    assert [len(part.split('<div class="line">')) - 1 for part in (first, second)] == [12, 12]
    assert first.count('<small class="good">rank 1</small>') == 6, "as many right queries as wrong ones"
    assert first.count("rank 7") == 12, "six wrong queries, each with its own sample at the end"
    assert first.count("<img") == 6 * 3 + 6 * 4
    assert second.count("<img") == 12
    assert len(re.findall(r'class="item own"', second)) == 12


def test_a_retrieval_without_predictions_still_has_its_numbers(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"test/t2i_r@1": 0.5, "test/i2t_r@1": 0.25, "test/loss": 2.0}))
    said = Page(write_report(tmp_path).read_text()).text
    assert "t2i_r@1" in said


def captioned(folder: Path, metrics: dict[str, float], turns: int = 1) -> Path:
    """A run that wrote about forty pictures, in every fifth sample something else than is wanted."""
    (folder / "a.png").write_bytes(picture_file(3))
    (folder / "a.wav").write_bytes(sound_file(3))
    wanted = tuple([f"a dog {i}"] * turns for i in range(40))
    written = tuple([*texts[:-1], "<b>no</b>" + "!" * i] if i % 5 == 0 else texts for i, texts in enumerate(wanted))
    ids = tuple(f"s{i}" for i in range(40))
    said = Texts(ids=ids, written=written, wanted=wanted)
    part = Texts(ids=ids[:20], written=wanted[:20], wanted=wanted[:20])
    media = {"image": str(folder / "a.png"), "audio": str(folder / "a.wav")}
    rows = {id: media | {"text": f"a dog {i}", "style": "ab"[i % 2]} for i, id in enumerate(ids)}
    write_predictions(folder, {"": said, "i": part}, rows=rows)
    (folder / "metrics.json").write_text(json.dumps({f"test/{name}": value for name, value in metrics.items()}))
    return folder


def test_a_run_that_writes_is_headed_by_what_it_wrote(tmp_path):
    run = captioned(tmp_path, {"exact": 0.8, "exact_i": 1.0, "perplexity": 3.0, "loss": 0.9})
    text = write_report(run).read_text()
    said = Page(text).text
    assert "80.0\u2009%\ntexts written exactly, test (95\u2009% interval" in said
    assert "Texts written exactly by group" in said
    assert "8 of 40 samples have a text that is not as wanted." in said
    drawn, worst = text.split('<div class="cards">')[1:]
    assert [part.count('<article class="card">') for part in (drawn, worst)] == [12, 8]
    assert worst.count("<img") == worst.count("<audio") == 8
    shown = re.findall(r'class="id">(s\d+)', worst)
    assert shown == [f"s{i}" for i in (35, 30, 25, 20, 15, 10, 5, 0)], "the longer text is wrong by more letters"
    assert "&lt;b&gt;no&lt;/b&gt;" in worst
    assert ">a dog 35<" in worst
    assert "<blockquote>" not in worst, "the text of a sample is what is wanted"
    assert "Worst errors" not in said


def test_error_rates_head_the_report_of_speech_with_their_intervals(tmp_path):
    from mmformer.report import read_predictions

    run = captioned(tmp_path, {})
    counts = read_predictions(run).counts("wer")
    rate = counts[:, 0].sum() / counts[:, 1].sum()
    (run / "metrics.json").write_text(json.dumps({"test/cer": 0.3, "test/wer": rate, "test/loss": 1.0}))
    said = Page(write_report(run).read_text()).text
    assert f"{rate * 100:.1f}\u2009%\nword error rate, test (95\u2009% interval" in said


def test_every_turn_of_a_talk_is_shown(tmp_path):
    run = captioned(tmp_path, {"exact": 112 / 120, "loss": 0.9}, turns=3)
    text = write_report(run).read_text()
    said = Page(text).text
    assert "93.3\u2009%\ntexts written exactly, test (95\u2009% interval" in said
    worst = text.split('<div class="cards">')[2]
    assert worst.count("wrote ") == 8 * 3
    assert worst.count(">is ") == 8
    assert worst.count("<blockquote>") == 8
