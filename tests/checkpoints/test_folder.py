from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmformer.checkpoints import build, load_model, save_model
from mmformer.checkpoints import folder as folder_module
from mmformer.datasets.tokenizers import ByteTokenizer, load_tokenizer
from mmformer.objectives import Contrastive, info_nce
from tests.checkpoints.configs import run_config
from tests.helpers import random_batch, scramble


@pytest.fixture
def saved(tmp_path: Path):
    config = run_config()
    model = scramble(build(config["model"])).eval()
    save_model(tmp_path / "model", model, config, ByteTokenizer())
    return model, tmp_path / "model"


def outputs(model, batch):
    with torch.inference_mode():
        return model.output(model.encode(batch), "label")[0]


def test_load_rebuilds_what_was_saved(saved):
    model, folder = saved
    batch = random_batch()
    state = torch.get_rng_state()
    loaded = load_model(folder)
    assert torch.equal(outputs(loaded.model, batch), outputs(model, batch))
    assert torch.equal(torch.get_rng_state(), state), "loading drew from the caller's random numbers"
    assert not loaded.model.training
    assert loaded.config["facts"] == run_config()["facts"]
    assert loaded.tokenizer is not None
    assert load_tokenizer(loaded.tokenizer) == ByteTokenizer()
    assert not any(folder.parent.glob(".*")), "something temporary is left"


def test_sha256sum_reads_the_checksums(saved):
    _, folder = saved
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("OK") == 3


def test_objectives_with_parameters_are_saved(tmp_path):
    config = run_config()
    config["objectives"] = {
        "match": {
            "_target_": "mmformer.objectives.Contrastive", "modalities": ["image", "audio"], "scale": 5.0,
            "loss": {"_target_": "hydra.utils.get_method", "path": "mmformer.objectives.info_nce"},
        }
    }  # fmt: skip
    match = Contrastive(["image", "audio"], info_nce, 5.0)
    with torch.no_grad():
        match.log_scale.fill_(2.5)
    save_model(tmp_path / "model", build(config["model"]), config, objectives={"match": match})
    loaded = load_model(tmp_path / "model").objectives["match"]
    assert isinstance(loaded, Contrastive)
    assert float(loaded.log_scale.detach()) == 2.5
    assert loaded.loss is info_nce


def test_tied_weights_are_stored_once_and_come_back(tmp_path):
    config = run_config()
    model = scramble(build(config["model"]))
    # Tied after it was built, and a view of a larger memory: neither may stop the file from being written.
    model.encoders["audio"].embedder.position = model.encoders["text"].embedder.position
    model.heads["label"].out.weight = torch.nn.Parameter(torch.randn(9, 24)[:7])
    model.fusion.entrances["image"] = model.fusion.entrances["audio"]
    save_model(tmp_path / "model", model, config)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert ("model.fusion.entrances.audio.kind" in stored) != ("model.fusion.entrances.image.kind" in stored)
    loaded = load_model(tmp_path / "model").model
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_saving_again_replaces_and_a_failure_keeps_the_old(saved, monkeypatch):
    model, folder = saved
    config = run_config() | {"facts": {"label_names": ["second"]}}
    save_model(folder, model, config)
    assert load_model(folder).config["facts"] == {"label_names": ["second"]}
    assert not (folder / "tokenizer.json").exists()

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_model(folder, model, run_config())
    assert load_model(folder).config["facts"] == {"label_names": ["second"]}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_writer_killed_between_its_renames_leaves_the_old_model(saved):
    model, folder = saved
    folder.rename(folder.with_name(".model.old"))
    assert load_model(folder).config["facts"] == run_config()["facts"]
    save_model(folder, model, run_config() | {"facts": {}})
    assert load_model(folder).config["facts"] == {}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "SHA256SUMS"])
def test_a_missing_file_is_named(saved, name):
    (saved[1] / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        load_model(saved[1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_file_is_named(saved, name, damage):
    path = saved[1] / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-3])
    with pytest.raises(ValueError, match=rf"{name} is damaged.*Copy the folder again"):
        load_model(saved[1])


def sums_again(folder: Path) -> None:
    names = [path.name for path in folder.iterdir() if path.name != "SHA256SUMS"]
    done = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True)
    (folder / "SHA256SUMS").write_text(done.stdout)


def test_weights_of_another_config_name_the_differences(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["model"]["heads"]["label"]["num_outputs"] = 9
    config["model"]["heads"]["other"] = dict(config["model"]["heads"]["label"])
    del config["model"]["encoders"]["text"]["embedder"]
    config["model"]["encoders"]["text"]["embedder"] = {"_target_": "torch.nn.Identity"}
    (folder / "config.json").write_text(json.dumps(config))
    sums_again(folder)
    with pytest.raises(ValueError, match=r"does not fit its config\.json") as caught:
        load_model(folder)
    message = str(caught.value)
    assert "missing model.heads.other.out.bias (9,)" in message
    assert "unexpected model.encoders.text.embedder.table.weight (300, 24)" in message
    assert "model.heads.label.out.weight is (7, 24) in the file and (9, 24) in the config" in message


def test_a_config_of_a_later_format_says_which_version(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text()) | {"format": 2, "mmformer": "9.9"}
    (folder / "config.json").write_text(json.dumps(config))
    sums_again(folder)
    with pytest.raises(ValueError, match=r"format 2, this version reads up to 1: install mmformer 9\.9"):
        load_model(folder)


def test_a_config_that_cannot_rebuild_is_refused_when_saving(tmp_path):
    model = build(run_config()["model"])
    with pytest.raises(ValueError, match="config\\['model'\\]"):
        save_model(tmp_path / "model", model, {"facts": {}})
    with pytest.raises(ValueError, match="plain values"):
        save_model(tmp_path / "model", model, run_config() | {"facts": {"label_names": {1, 2}}})
    assert not list(tmp_path.iterdir())
