"""Files of every kind, checked against the trained model; and the runner on them, in a Python without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmformer.cli import main
from mmformer.export import EXACT, INT8, Bar, ExportError, Options, export, rows_of
from mmformer.predict import Predictor, load
from mmformer.runtime import Runtime
from tests.checkpoints.configs import run_config
from tests.test_predict import save, write_manifest, write_media

pytestmark = [
    pytest.mark.traced,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the exporters, about one another
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
LOOSE = Bar(difference=float("inf"), agreement=0.5, cosine=0.9)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_manifest(folder / "rows.csv", write_media(folder))
    run = save(folder / "run", run_config(dim=12))
    (run / "config.yaml").write_text(f"data: {{path: {folder / 'rows.csv'}}}\n")
    return folder


@pytest.fixture(scope="module")
def predictor(place) -> Predictor:
    return load(place / "run")


@pytest.fixture(scope="module")
def rows(place, predictor):
    return rows_of(predictor, place / "rows.csv", None)


@pytest.fixture(scope="module")
def onnx(place, predictor, rows) -> Path:
    pytest.importorskip("onnxscript", reason="ONNX files are an extra")
    pytest.importorskip("onnxruntime", reason="ONNX files are an extra")
    return export(predictor, place / "model.onnx", rows).path


def test_onnx_says_what_the_model_says(place, predictor, rows, onnx):
    runtime = Runtime(onnx, threads=1)
    samples = [{name: value for name, value in row.items() if name != "id"} for row in rows]
    assert len(samples) == 21
    assert runtime.predict(samples) == predictor.predict(samples)
    ours, theirs = (
        np.array([list(one.values()) for one in part.predict_proba(samples)]) for part in (runtime, predictor)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(runtime.embed(samples), predictor.embed(samples).numpy(), atol=1e-4)
    path = {"image": place / "6.png", "audio": str(place / "6.wav"), "text": "what, 6?"}
    assert runtime.predict(path) == predictor.predict(path)


BLOCKED = """
import sys, json

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "jaxtyping", "pyarrow", "torchaudio"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, NoTorch())
from mmformer.runtime import Runtime
found = Runtime(sys.argv[1]).predict(json.loads(sys.argv[2]))
assert "torch" not in sys.modules
print(json.dumps(found))
"""


def test_the_runner_runs_where_there_is_no_torch(place, predictor, onnx):
    samples = [{"image": str(place / f"{i}.png"), "audio": str(place / f"{i}.wav"), "text": "what?"} for i in (6, 13)]
    command = [sys.executable, "-c", BLOCKED, str(onnx), json.dumps(samples)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == predictor.predict(samples)


def test_int8_is_smaller_and_keeps_the_looser_bar(place, predictor, rows, onnx):
    done = export(predictor, place / "small.onnx", rows, Options(int8=True, encoder="text"), LOOSE)
    assert 0 < done.difference < 10
    assert Runtime(done.path).embed({"text": "what?"}).shape == (12,)
    assert not list(place.glob("*.fp32.onnx"))


def test_torch_export(place, predictor, rows):
    done = export(predictor, place / "model.pt2", rows)
    assert done.difference <= 1e-4
    assert len(done.compared) == 14  # logits and what is fused, of seven subsets


def test_one_encoder_alone(place, predictor, rows):
    done = export(predictor, place / "text.pt2", rows, Options(encoder="text"))
    assert [(compared.output, compared.modalities) for compared in done.compared] == [("text_embedding", ("text",))]


def test_a_file_that_says_something_else_is_removed(place, predictor, rows):
    path = place / "wrong.pt2"
    with pytest.raises(ExportError, match=r"wrong.pt2 does not say what the trained model says(.|\n)*logits of text"):
        export(predictor, path, rows, bar=Bar(difference=-1.0))
    assert not path.exists()


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_executorch(place, predictor, rows, int8):
    pytest.importorskip("executorch", reason=".pte files are an extra")
    bar = LOOSE if int8 else EXACT
    done = export(predictor, place / f"text_{int8}.pte", rows[:9], Options(encoder="text", int8=int8), bar)
    assert (place / f"text_{int8}.pte.json").is_file()
    assert np.isfinite(Runtime(done.path, threads=1).embed({"text": "what?"})).all()


def test_the_command_says_what_it_wrote(place, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", str(place / "run"), "--format", "pt2", "--encoder", "audio", "--json"])
    assert ended.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(place / "run" / "export" / "audio.pt2")
    assert Path(said["path"]).stat().st_size == said["bytes"]
    assert said["difference"] <= EXACT.difference < INT8.difference


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "pte", "-o", "a.onnx"], "a file of --format pte ends in .pte"),
        (["--encoder", "smell"], "no encoder 'smell': this model has text, image, audio"),
        (["--package"], "a package of AOTInductor ends in .pt2"),
        (["--picture", "12"], "--picture 12: write it as HEIGHTxWIDTH"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
    ],
    ids=str,
)
def test_what_is_refused_ends_with_two_and_a_reason(place, capsys, options, said):
    with pytest.raises(SystemExit) as ended:
        main(["export", str(place / "run"), *options])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_run_whose_data_are_not_there_wants_some(place, predictor, capsys, tmp_path):
    save(tmp_path / "run", run_config(dim=12))
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run")])
    assert "it does not say what its data are: give rows to check with (--data rows.csv)" in capsys.readouterr().err
