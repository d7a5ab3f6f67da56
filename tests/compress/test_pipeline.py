import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from mmformer.cli import main
from mmformer.compress import measure, pipeline
from mmformer.compress.costs import Latency, Operations
from mmformer.compress.criteria import Magnitude
from mmformer.compress.measure import Measured, Times
from mmformer.compress.page import build
from mmformer.compress.pipeline import Recipe, TooLossy, best, complaints, compress, read_recipe
from mmformer.compress.stages import Export, Prune, Train
from mmformer.compress.training import again, taught
from mmformer.predict import load
from tests.checkpoints.configs import run_config
from tests.test_predict import save, write_manifest, write_media
from tests.test_train import SMALL, train


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_manifest(folder / "rows.csv", write_media(folder))
    save(folder / "run", run_config())
    return folder


def figures(name: str, ms: float, **accuracy: float) -> Measured:
    times = Times(p50=ms, p95=2 * ms, throughput=1e3 / ms)
    by = {letters.strip("_"): value for letters, value in accuracy.items()}
    return Measured(name=name, size=1000, parameters=10, operations=20.0, times={1: times, 8: times}, memory=None,
                    metric="acc", accuracy=by, difference=0.0)  # fmt: skip


@pytest.fixture(autouse=True)
def _memory(monkeypatch):
    """Measuring memory starts a process for each model, which is tested in test_measure.py."""
    monkeypatch.setattr(measure, "peak_memory", lambda path, sample: 1)


@dataclass(frozen=True)
class Copying:
    """A stage that copies what it gets, and counts how often."""

    log: Path
    word: str = "copied"

    def __call__(self, work, start, folder):
        with self.log.open("a") as file:
            file.write(f"{self.word}\n")
        shutil.copytree(start / "model", folder / "model", dirs_exist_ok=True)
        return folder


def test_what_is_done_is_not_done_again_unless_something_before_it_changed(place, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "best", lambda measured, recipe: measured[0])
    log, lines = tmp_path / "log", []

    def once(*stages):
        recipe = Recipe(stages={f"s{i}": stage for i, stage in enumerate(stages)})
        found = compress(
            place / "run", recipe, tmp_path / "made", place / "rows.csv", rows=4, rounds=1, tell=lines.append
        )
        return found, log.read_text().split()

    first, second = Copying(log, "a"), Copying(log, "b")
    found, said = once(first, second)
    assert said == ["a", "b"]
    assert [one.name for one in found.measured] == ["run", "s0", "s1"]
    assert all(one.accuracy == found.measured[0].accuracy for one in found.measured)
    assert found.measured[2].difference == 0
    assert once(first, second)[1] == ["a", "b"]
    assert "2_s1: done before" in lines
    assert once(first, replace(second, word="c"))[1] == ["a", "b", "c"]
    assert once(replace(first, word="d"), replace(second, word="c"))[1] == ["a", "b", "c", "d", "c"]
    summary = json.loads((tmp_path / "made" / "compress.json").read_text())
    assert set(summary["stages"]) == {"run", "s0", "s1"}
    assert summary["measured"][1]["accuracy"]
    assert "<svg" in (tmp_path / "made" / "compress.html").read_text()


def test_a_stage_that_was_stopped_under_other_settings_starts_anew(place, tmp_path):
    work = pipeline.Work(run=place / "run", data=place / "rows.csv", tell=lambda line: None)
    folder = tmp_path / "1_x"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "begun.json").write_text('{"key": "old"}')
    made = pipeline._stage(work, Copying(tmp_path / "log"), place / "run", folder, "new")
    assert made == folder
    assert not (folder / "checkpoints").exists()


def test_the_best_is_the_fastest_within_the_limits():
    run = figures("run", 10.0, _=0.97, t=0.5, ti=0.97)
    good, lossy = figures("good", 5.0, _=0.96, t=0.49, ti=0.96), figures("lossy", 2.0, _=0.93, t=0.5, ti=0.93)
    unfair = figures("unfair", 3.0, _=0.97, t=0.4, ti=0.97)
    recipe = Recipe(stages={}, most_lost=0.02, most_lost_of_a_subset=0.05)
    assert best([run, good, lossy, unfair], recipe) is good
    assert best([run, good, lossy, unfair], Recipe(stages={})) is lossy
    assert complaints(run, lossy, recipe) == ["acc 0.9700 -> 0.9300 (at most 0.02)"]
    assert complaints(run, unfair, recipe) == ["acc_t 0.5000 -> 0.4000 (at most 0.05)"]
    lacking = figures("lacking", 1.0, _=0.97)
    assert len(complaints(run, lacking, recipe)) == 2
    with pytest.raises(
        TooLossy, match=r"lossy loses more than the recipe allows: acc 0\.9700 -> 0\.9300 \(at most 0\.02\)"
    ):
        pipeline._check(run, lossy, recipe)
    error = replace(run, metric="mae"), replace(good, metric="mae", accuracy={"": 1.2, "t": 0.5, "ti": 0.97})
    assert complaints(*error, recipe) == ["mae 0.9700 -> 1.2000 (at most 0.02)"]


def test_the_winner_is_exported(place, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "best", lambda measured, recipe: measured[1])
    made = []
    monkeypatch.setattr(pipeline, "Export", lambda: lambda work, start, folder: made.append((start, folder)) or folder)
    recipe = Recipe(stages={"copy": Copying(tmp_path / "log")})
    found = compress(place / "run", recipe, tmp_path, place / "rows.csv", rows=3, rounds=1, tell=lambda line: None)
    assert found.winner.name == "copy"
    assert made == [(tmp_path / "1_copy", tmp_path / "winner")]


def test_a_lossy_recipe_fails_with_the_figures(place, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "best", lambda measured, recipe: measured[0])
    recipe = Recipe(stages={"copy": Copying(tmp_path / "log")}, most_lost=-0.5)
    with pytest.raises(TooLossy, match="copy loses more than the recipe allows: acc"):
        compress(place / "run", recipe, tmp_path, place / "rows.csv", rows=3, rounds=1, tell=lambda line: None)
    assert (tmp_path / "compress.json").is_file()  # what was measured is kept


@pytest.mark.parametrize("name", ["small", "tiny", "int8", "mobile"])
def test_recipes_come_with_the_package(name):
    recipe, _ = read_recipe(name)
    assert recipe.stages
    assert isinstance(list(recipe.stages.values())[-1], Export)
    assert recipe.most_lost is not None


def test_a_recipe_is_changed_by_words_and_may_be_one_s_own(tmp_path):
    recipe, plain = read_recipe("small", ["stages.recover.steps=300", "most_lost=0.1", "stages.prune.share=0.3"])
    assert recipe.stages["recover"] == Train(effort=0.5, steps=300)
    assert recipe.stages["prune"].share == 0.3
    assert (recipe.most_lost, plain["most_lost"]) == (0.1, 0.1)
    own = tmp_path / "mine.yaml"
    own.write_text(
        "stages:\n  cut:\n    _target_: mmformer.compress.stages.Prune\n    share: 0.4\n"
        "    cost: {_target_: mmformer.compress.costs.Latency, rounds: 3}\n"
        "    criterion: {_target_: mmformer.compress.criteria.Magnitude}\n"
    )
    recipe, _ = read_recipe(str(own))
    assert recipe.stages["cut"] == Prune(share=0.4, cost=Latency(rounds=3), criterion=Magnitude())
    assert Prune(share=0.5).cost == Operations()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing",), "no recipe 'nothing': there are int8, mobile, small, tiny"),
        (("small", ["steps.recover=3"]), r"nothing to override by 'steps\.recover=3'"),
        (("small", ["stages.prune.shaer=3"]), "shaer"),
    ],
)
def test_mistakes_in_a_recipe_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(*words)


def test_a_page_has_each_stage_in_its_charts_and_tables():
    page = build([figures("run", 10.0, _=0.97, t=0.5), figures("pruned", 5.0, _=0.96, t=0.49)], "pruned")
    assert page.count("pruned") >= 5
    assert page.count("<svg") == 2
    assert "0.4900" in page


def test_each_objective_gets_one_that_learns_the_same_of_a_teacher():
    objectives = {
        "answer": {"_target_": "mmformer.objectives.Classes", "head": "answer", "target": "label"},
        "sound": {"_target_": "mmformer.objectives.Labels", "head": "sound", "target": "x", "source": "audio"},
        "words": {"_target_": "mmformer.objectives.NextToken", "head": "vocabulary"},
        "pairs": {"_target_": "mmformer.objectives.Contrastive", "modalities": ["text", "image"]},
        "other": {"_target_": "mmformer.objectives.SpanPenalty"},
    }
    heads = {name: {"num_outputs": 12} for name in ("text", "image")}
    found = taught(objectives, {"heads": heads}, 3.0)
    assert set(found) == {"taught_answer", "taught_sound", "taught_words", "taught_pairs"}
    assert found["taught_sound"]["compare"] == {"_target_": "mmformer.objectives.SoftLabels", "temperature": 3.0}
    assert found["taught_sound"]["source"] == "audio"
    assert found["taught_pairs"]["dim"] == found["taught_pairs"]["taught_dim"] == 12
    assert found["taught_words"]["language"] == objectives["words"]
    with pytest.raises(ValueError, match=r"\['other'\] have no counterpart"):
        taught({"other": objectives["other"]}, {}, 1.0)


def test_a_training_again_lies_in_its_own_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "rows.csv").write_text("text\n")
    config = {
        "paths": {"run": "/old/runs/x", "root": str(tmp_path)},
        "data": {"path": "rows.csv", "module": {"path": "rows.csv"}},
        "callbacks": {"checkpoints": {"folder": "/old/runs/x/checkpoints"}},
        "trainer": {"max_steps": 100, "max_epochs": -1},
        "module": {
            "optimizer": {"lr": 1e-3},
            "weights": {"answer": 2.0},
            "objectives": {"answer": {"_target_": "mmformer.objectives.Classes", "head": "answer", "target": "label"}},
            "model": {},
        },
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    made = again(run, tmp_path / "start", tmp_path / "here", 30, 0.5, 2.0)
    assert made["callbacks"]["checkpoints"]["folder"] == str(tmp_path / "here" / "checkpoints")
    assert made["data"]["module"]["path"] == made["data"]["path"] == str(tmp_path / "rows.csv")
    assert made["trainer"]["max_steps"] == 30
    assert made["module"]["optimizer"]["lr"] == 5e-4
    assert list(made["module"]["objectives"]) == ["answer", "teacher", "taught_answer"]
    assert made["module"]["weights"] == {"answer": 2.0, "taught_answer": 2.0}
    assert made["resume"] is None
    (tmp_path / "here" / "checkpoints").mkdir(parents=True)
    assert again(run, tmp_path / "start", tmp_path / "here", 30, 0.5, None)["resume"] == str(tmp_path / "here")
    assert "teacher" not in again(run, tmp_path / "start", tmp_path / "here", 30, 0.5, None)["module"]["objectives"]


def test_a_run_is_cut_and_trained_again_with_itself_as_teacher(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "best", lambda measured, recipe: measured[0])
    write_manifest(tmp_path / "rows.csv", write_media(tmp_path, 42))
    shorter = ["data.columns.label=label", "trainer.max_steps=2", "trainer.enable_progress_bar=false"]
    code, said = train(tmp_path, *SMALL, *shorter, "callbacks.progress=null", f"data.path={tmp_path / 'rows.csv'}")
    assert code == 0, said
    (run,) = (tmp_path / "runs" / "t").iterdir()
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "stages:\n  prune: {_target_: mmformer.compress.stages.Prune, share: 0.9, samples: 16, batch_size: 8}\n"
        "  recover: {_target_: mmformer.compress.stages.Train, steps: 2}\n"
    )
    with pytest.raises(SystemExit) as caught:
        main(["compress", str(run), f"recipe={recipe}", "--rounds", "1", "-o", str(tmp_path / "made")])
    printed = capsys.readouterr()
    assert not caught.value.code, printed.err
    assert "teacher:" in printed.out
    recovered = load(tmp_path / "made" / "2_recover")
    whole = load(run)
    assert sum(p.numel() for p in recovered.model.parameters()) < sum(p.numel() for p in whole.model.parameters())
    held = json.loads((tmp_path / "made" / "2_recover" / "model" / "config.json").read_text())
    assert held["compressed"]["sites"]
    assert set(held["objectives"]) >= {"teacher", "taught_answer"}
