from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import mmformer
from mmformer.cli import main
from tests.checkpoints.configs import NAMES, run_config
from tests.report.runs import write_run
from tests.test_predict import save, write_manifest, write_media


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_manifest(folder / "rows.csv", write_media(folder))
    save(folder / "run", run_config())
    return folder


def run(capsys, *words) -> tuple[int, str, str]:
    """The exit code, output and errors of a command line."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    code = caught.value.code
    return int(code or 0) if not isinstance(code, str) else 1, printed.out, printed.err


def test_the_version_and_the_help_import_nothing_heavy():
    code = (
        "import sys\nfrom mmformer.cli import main\n"
        "try: main([{!r}])\nexcept SystemExit: pass\n"
        "assert not {{'torch', 'numpy', 'pyarrow', 'hydra', 'yaml'}} & set(sys.modules), sorted(sys.modules)"
    )
    for option in ["--help", "--version"]:
        done = subprocess.run([sys.executable, "-c", code.format(option)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "mmformer" in done.stdout
    assert f"mmformer {mmformer.__version__}" in done.stdout


def test_predict_prints_the_label_and_probabilities(place, capsys):
    code, out, _ = run(capsys, "predict", place / "run", "--text", "what?", "--image", place / "6.png", "--top", 3)
    lines = out.splitlines()
    wanted = mmformer.load(place / "run").predict_proba({"text": "what?", "image": place / "6.png"})
    best = sorted(wanted, key=wanted.__getitem__, reverse=True)
    assert code == 0
    assert lines[0] == best[0]
    assert [line.split()[0] for line in lines[1:]] == best[:3]
    assert lines[1].split()[1] == f"{wanted[best[0]]:.2%}"


def test_predict_prints_json(place, capsys):
    code, out, _ = run(capsys, "predict", place / "run", "--audio", place / "6.wav", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["prediction"] in NAMES
    assert set(found["probabilities"]) == set(NAMES)
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_predict_writes_a_table(place, capsys, tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    code, printed, errors = run(capsys, "predict", place / "run", "--input", place / "rows.csv", "--output", out)
    assert (code, printed) == (0, "")
    assert f"21 predictions in {out}" in errors
    if suffix == ".parquet":
        rows = pq.read_table(out).to_pylist()
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        lines = out.read_text().splitlines()
        rows = list(csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ","))
    wanted = mmformer.load(place / "run").predict(place / "rows.csv")
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(21)]
    assert [row["prediction"] for row in rows] == wanted


def test_predict_to_the_screen_names_what_is_broken(place, capsys, tmp_path):
    manifest = write_manifest(
        tmp_path / "rows.csv", [{"id": "a", "text": "x", "image": "no.png"}, {"id": "b", "text": "y"}]
    )
    code, out, errors = run(capsys, "predict", place / "run", "--input", manifest)
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0
    assert [row["fault"] for row in rows] == ["image no.png: no such file", ""]
    assert "1 rows have something that could not be read: a: image no.png: no such file" in errors


def test_a_model_with_parts_of_ones_own_is_opened_by_name(place, capsys, tmp_path, monkeypatch):
    package = "from mmformer.heads import Head\n\nclass MyHead(Head):\n    pass\n"
    (tmp_path / "my_heads.py").write_text(package)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = run_config()
    config["model"]["heads"]["label"]["_target_"] = "my_heads.MyHead"
    from mmformer.checkpoints import build, save_model

    save_model(tmp_path / "run" / "model", build(config["model"], allow=["my_heads"]), config)
    config["features"] = {}
    code, _, errors = run(capsys, "predict", tmp_path / "run", "--text", "x")
    assert code == 2
    assert "my_heads.MyHead, which is no part of mmformer" in errors
    assert "allow=['my_heads']" in errors
    code, _, errors = run(capsys, "predict", tmp_path / "run", "--text", "x", "--allow", "my_heads")
    assert "needs tokenizer.json" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "{place}/run"], "give one sample (--text, --image, --audio) or a manifest"),
        (["predict", "{place}/run", "--text", "a", "--input", "b.csv"], "one of the two"),
        (["predict", "{place}/run", "--text", "a", "--output", "b.csv"], "it goes with --input"),
        (["predict", "{place}/run", "--input", "{place}/rows.csv", "--output", "b.xls"], "ends in one of .csv"),
        (["predict", "{place}/run", "--image", "no.png"], "image no.png: no such file"),
        (["predict", "{place}/run", "--with", "smell=a"], "has the key 'smell': this model takes text, image, audio"),
        (["predict", "{place}/run", "--with", "smell"], "write it as NAME=VALUE"),
        (["predict", "{place}/nowhere", "--text", "a"], "`mmformer runs` lists the runs"),
        (["predict", "{place}/run", "--input", "no.csv"], "no.csv: no such file"),
        (["report", "{place}"], "is not a run"),
        (["runs", "{place}/nowhere"], "train first"),
        (
            ["convert", "{place}/run", "--to", "keras", "--output", "x"],
            "is not one of 'transformers', 'timm', 'open_clip'",
        ),
        (
            ["convert", "{place}/run", "--to", "timm", "--output", "{place}/run"],
            "is there already: give another folder",
        ),
        (
            ["convert", "{place}/run", "--to", "timm", "--output", "x", "--part", "encoders.smell"],
            "no part 'encoders.smell' to convert: this model has encoders.text, encoders.image, encoders.audio",
        ),
        (["predct"], "No such command 'predct'"),
        (["predict", "--colour"], "No such option"),
    ],
)
def test_a_mistake_is_one_line_with_the_next_step_and_exit_code_2(place, capsys, words, message):
    code, out, errors = run(capsys, *(word.format(place=place) for word in words))
    assert code == 2
    assert out == ""
    assert message in errors
    assert "Traceback" not in errors
    if errors.startswith("mmformer: error:"):
        assert len(errors.strip().splitlines()) == 1


def test_debug_shows_the_traceback(place):
    with pytest.raises(FileNotFoundError):
        main(["predict", str(place / "nowhere"), "--text", "a", "--debug"])


def test_a_fault_of_the_program_has_exit_code_1(capsys, monkeypatch, place):
    def broken(*args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("mmformer.predict.load", broken)
    code, _, errors = run(capsys, "predict", place / "run", "--text", "a")
    assert code == 1
    assert "RuntimeError: shapes differ" in errors
    assert "--debug" in errors


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, accuracy in [("one", 0.5), ("two", 0.9)]:
        folder = write_run(root / "digits" / name, count=30)
        metrics = json.loads((folder / "metrics.json").read_text()) | {"test/acc": accuracy, "test/loss": 1 - accuracy}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    unfinished = root / "other" / "three"
    unfinished.mkdir(parents=True)
    (unfinished / "config.yaml").write_text("task_name: other\n")
    return root


def test_runs_are_listed_with_their_metrics(root, capsys):
    code, out, _ = run(capsys, "runs", root)
    lines = out.splitlines()
    assert code == 0
    assert len(lines) == 4
    assert "test/acc" in lines[0]
    assert "test/acc_t" not in lines[0]
    assert str(root / "digits" / "two") in out
    assert "(unfinished)" in next(line for line in lines if "three" in line)


@pytest.mark.parametrize("metric", ["test/acc", "test/loss"])
def test_runs_are_sorted_with_the_best_first(root, capsys, metric):
    _, out, _ = run(capsys, "runs", root, "--sort", metric)
    assert [Path(line.split()[0]).name for line in out.splitlines()[1:]] == ["two", "one", "three"]


def test_runs_as_json_and_a_metric_that_is_none(root, capsys):
    code, out, _ = run(capsys, "runs", root, "--json")
    found = {Path(row["run"]).name: row["metrics"] for row in json.loads(out)}
    assert code == 0
    assert found["one"]["test/acc"] == 0.5
    assert found["three"] == {}
    code, _, errors = run(capsys, "runs", root, "--metric", "test/accuracy")
    assert code == 2
    assert "no run has the metric 'test/accuracy'; they have" in errors


def test_report_writes_the_page_and_says_where(root, capsys):
    code, out, _ = run(capsys, "report", root / "digits" / "one")
    assert code == 0
    assert Path(out.strip()) == root / "digits" / "one" / "report.html"
    assert Path(out.strip()).stat().st_size > 10_000


def test_convert_writes_a_folder_and_says_how_to_open_it(capsys, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the library to convert to")
    from mmformer.checkpoints import load, save_model

    size = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    reference = transformers.ViTForImageClassification(transformers.ViTConfig(**size, image_size=8, patch_size=4))
    reference.save_pretrained(tmp_path / "vit")
    loaded = load(tmp_path / "vit")
    save_model(tmp_path / "run" / "model", loaded.model, {"model": loaded.config, "origins": [loaded.origin.plain()]})
    capsys.readouterr()
    out = tmp_path / "out"
    code, printed, _ = run(capsys, "convert", tmp_path / "run", "--to", "transformers", "--output", out)
    assert code == 0
    assert printed.splitlines() == [
        f"{out}: transformers/vit",
        f'  transformers.ViTForImageClassification.from_pretrained("{out}")',
    ]
    again = transformers.ViTForImageClassification.from_pretrained(out)
    assert all((a == b).all() for a, b in zip(again.parameters(), reference.parameters(), strict=True))


def test_models_are_listed_with_what_was_measured(capsys):
    from mmformer.checkpoints.families import FAMILIES

    known = [f"{family.library}/{family.name}" for family in FAMILIES if family.library != "mmformer"]
    code, out, _ = run(capsys, "models", "--json")
    families = json.loads(out)["families"]
    assert code == 0
    assert set(known) == set(families), "run python -m benchmarks.parity"
    assert all(family["classes"] for family in families.values())
    assert all(0 <= difference <= 1e-5 for family in families.values() for difference in family["classes"].values())
    code, out, _ = run(capsys, "models")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.startswith(tuple(families))] == list(families)
    page = (Path(__file__).resolve().parents[1] / "docs" / "pretrained.md").read_text()
    assert not [name for name in families if f"`{name}`" not in page]
