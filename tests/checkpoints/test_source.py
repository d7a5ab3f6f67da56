from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmformer.checkpoints import families, hub, load_model, save_model
from mmformer.checkpoints.build import build
from mmformer.checkpoints.families import own
from mmformer.checkpoints.load import load, load_into
from mmformer.checkpoints.source import Source, open_source, source_of
from mmformer.checkpoints.store import RefusedFile
from tests.checkpoints.configs import run_config
from tests.helpers import scramble

TENSORS = {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4), "b.weight": torch.randn(2, 5)}


def same(source: Source, tensors=TENSORS) -> bool:
    names = sorted(source.tensors) == sorted(tensors)
    return names and all(torch.equal(source.tensors[name], tensors[name]) for name in tensors)


def shards(folder: Path, ending: str) -> Path:
    """The tensors in two files with an index, as transformers writes them."""
    stem = "model" if ending == "safetensors" else "pytorch_model"
    files = {name: f"{stem}-0000{1 + (name > 'a.z')}-of-00002.{ending}" for name in TENSORS}
    for file in set(files.values()):
        content = {name: TENSORS[name] for name in TENSORS if files[name] == file}
        save_file(content, folder / file) if ending == "safetensors" else torch.save(content, folder / file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


# Files.


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    source = open_source(tmp_path / "x.safetensors")
    assert same(source)
    assert source.extra == {"format": "pt"}
    assert source.tensors.shape("a.weight") == (4, 3)
    assert source.origin == str(tmp_path / "x.safetensors")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards(tmp_path, ending):
    assert same(open_source(shards(tmp_path, ending)))
    index = next(tmp_path.glob("*.index.json"))
    assert same(open_source(index))


@pytest.mark.parametrize("ending", ["bin", "pt", "pth", "ckpt"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_torch_saves(tmp_path, ending, zipped):
    path = tmp_path / f"x.{ending}"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    assert same(open_source(path))


def test_tensors_of_a_zip_are_mapped_not_read(tmp_path):
    torch.save({"w": torch.randn(1000)}, tmp_path / "x.pt")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("mapped files are listed in /proc, which this system lacks")
    source = open_source(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in maps.read_text()
    assert source.tensors.shape("w") == (1000,)


@pytest.mark.parametrize(
    ("wrapped", "extra"),
    [
        ({"model": TENSORS, "epoch": 3, "config": {"k": 1}}, {"epoch": 3, "config": {"k": 1}}),
        ({"state_dict": TENSORS, "hyper_parameters": {"lr": 0.1}}, {"hyper_parameters": {"lr": 0.1}}),
        (
            {"epoch": 9, "name": "x", "state_dict": {f"module.{n}": t for n, t in TENSORS.items()}},
            {"epoch": 9, "name": "x"},
        ),
        ({"model": {"state_dict": TENSORS}, "args": None}, {"args": None}),
        ({**TENSORS, "version": 2}, {"version": 2}),
    ],
    ids=["ALBEF, BLIP, LAVIS", "Lightning", "open_clip", "nested", "a number among tensors"],
)
def test_wrappers_are_opened_and_what_lies_beside_is_kept(tmp_path, wrapped, extra):
    torch.save(wrapped, tmp_path / "x.pth")
    source = open_source(tmp_path / "x.pth")
    assert same(source)
    assert source.extra == extra


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_of_wrappers_come_off(prefix):
    assert same(source_of({prefix + name: tensor for name, tensor in TENSORS.items()}))


def test_a_prefix_comes_off_only_where_it_wraps_all():
    tensors = {"module.x": torch.zeros(1), "y": torch.zeros(1)}
    assert set(source_of(tensors).tensors) == {"module.x", "y"}
    with pytest.raises(RefusedFile, match="the file holds two models"):
        source_of({"_orig_mod.x": torch.zeros(1), "x": torch.zeros(1)})


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"lr": 0.1}, 3], ids=repr)
def test_a_file_without_tensors_by_name_says_so(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(RefusedFile, match=r"x\.pt holds"):
        open_source(tmp_path / "x.pt")


# TorchScript, which OpenAI's CLIP files are.


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3).half())
        self.register_buffer("mask", torch.ones(3, 3).triu(1))

    def forward(self, x):
        return x @ self.weight.t().float()


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Inner(), nn.Linear(4, 2))
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("input_resolution", torch.tensor(224))
        self.tied = self.blocks[1]

    def forward(self, x):
        return self.blocks(x) * self.scale


def script(path: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, about TorchScript's future
        module = torch.jit.script(Clip())
        torch.jit.save(module, str(path))
    return module


def test_torchscript_is_read_without_being_loaded(tmp_path, monkeypatch):
    module = script(tmp_path / "ViT-B-32.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the code was loaded"))
    source = open_source(tmp_path / "ViT-B-32.pt")
    expected = module.state_dict()
    assert set(expected) <= set(source.tensors)
    assert set(source.tensors) - set(expected) == set()
    for name, tensor in expected.items():
        assert torch.equal(source.tensors[name], tensor), name
        assert source.tensors.dtype(name) == tensor.dtype


# Folders.


def test_a_folder_of_transformers(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({"z": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1]}')
    (tmp_path / "vocab.txt").write_text("a")
    source = open_source(tmp_path)
    assert same(source), "safetensors come before pickles"
    assert source.config == {"model_type": "vit"}
    assert source.json("preprocessor_config.json") == {"image_mean": [0.1]}
    assert source.json("absent.json") == {}
    assert source.files["vocab.txt"] == tmp_path / "vocab.txt"
    assert open_source(tmp_path / "model.safetensors").config == source.config
    assert set(open_source(tmp_path, weights="pytorch_model.bin").tensors) == {"z"}


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_folder_of_open_clip(tmp_path, ending):
    if ending == "bin":
        torch.save(TENSORS, tmp_path / "open_clip_pytorch_model.bin")
    else:
        save_file(TENSORS, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 4}}')
    source = open_source(tmp_path)
    assert same(source)
    assert source.config == {"model_cfg": {"embed_dim": 4}}


def test_a_folder_of_timm(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny", "pretrained_cfg": {}}')
    assert open_source(tmp_path).config["architecture"] == "vit_tiny"


def test_a_folder_with_one_loose_file_and_with_two(tmp_path):
    torch.save(TENSORS, tmp_path / "vit_b_16.pth")
    assert same(open_source(tmp_path))
    torch.save(TENSORS, tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match=r"other files of weights: other\.pth, vit_b_16\.pth"):
        open_source(tmp_path)
    assert same(open_source(tmp_path, weights="other.pth"))


def test_a_lone_file_takes_no_config_that_happens_to_lie_beside(tmp_path):
    torch.save(TENSORS, tmp_path / "mine.pt")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert open_source(tmp_path / "mine.pt").config == {}


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt: no such file or folder"):
        open_source(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        open_source(tmp_path)


# Our own.


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder: the model that it exported and its best checkpoint."""
    config = run_config()
    model = scramble(build(config["model"])).eval()
    save_model(tmp_path / "run" / "model", model, config)
    data = {name: config[name] for name in ("features",)}
    whole = {
        "task_name": "t", "facts": config["facts"], "data": data,
        "module": {"model": config["model"], "objectives": config["objectives"]},
    }  # fmt: skip
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(whole))
    (tmp_path / "run" / "checkpoints").mkdir()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "run" / "checkpoints" / "best.ckpt")
    return tmp_path / "run"


@pytest.mark.parametrize("place", [".", "model", "model/model.safetensors", "checkpoints/best.ckpt"])
def test_our_own_runs_models_and_checkpoints(run, place, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", own.FAMILIES)
    loaded = load(run / place)
    wanted = load_model(run / "model").model.state_dict()
    assert loaded.report.ok
    assert loaded.report.share == 1
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.model.state_dict().items())
    part = load(run / place, part="encoders.text")
    assert torch.equal(part.model.get_parameter("embedder.table.weight"), wanted["encoders.text.embedder.table.weight"])


def test_objectives_of_our_own_come_along(tmp_path):
    config = run_config()
    config["objectives"] = {
        "match": {
            "_target_": "mmformer.objectives.Contrastive", "modalities": ["image", "audio"], "scale": 5.0,
            "loss": {"_target_": "hydra.utils.get_method", "path": "mmformer.objectives.info_nce"},
        }
    }  # fmt: skip
    match = build(config["objectives"]["match"])
    with torch.no_grad():
        match.log_scale.fill_(2.5)
    save_model(tmp_path / "model", build(config["model"]), config, objectives={"match": match})
    loaded = load(tmp_path / "model")
    assert float(loaded.objectives["match"].log_scale.detach()) == 2.5
    report = load_into(build(config["model"]), tmp_path / "model")
    ignored = {line.sources[0].name: line.note for line in report.of("ignored")}
    assert ignored == {f"objectives.match.{name}": "belongs to an objective" for name in match.state_dict()}


def test_a_run_without_a_model_gives_its_best_checkpoint(run):
    shutil.rmtree(run / "model")
    assert load(run).report.ok


def test_the_average_is_taken_where_a_checkpoint_has_one(run):
    path = run / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    average = {f"average.module.{name}": tensor + 1 for name, tensor in state.items()}
    torch.save({"state_dict": state | average | {"average.updates": torch.tensor(3)}}, path)
    loaded = load(path)
    name = "encoders.text.embedder.table.weight"
    assert torch.equal(loaded.model.get_parameter(name), state[f"model.{name}"] + 1)
    assert {line.note for line in loaded.report.of("ignored")} == {
        "the checkpoint has an average of it", "belongs to the average of the weights",
    }  # fmt: skip


def test_a_checkpoint_alone_fills_a_model_but_describes_none(run, tmp_path):
    path = shutil.copy(run / "checkpoints" / "best.ckpt", tmp_path / "alone.ckpt")
    with pytest.raises(
        ValueError, match="comes without a config: give the folder that has one, or load it into a model"
    ):
        load(path)
    model = build(run_config()["model"])
    assert load_into(model, path).share == 1


def test_a_model_that_was_changed_since_it_was_saved_is_refused(run):
    path = run / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load(run)


# The hub and the tracker.


class Hub:
    """huggingface_hub with one repository, a cache, and perhaps a network."""

    def __init__(self, folder: Path, online: bool = True):
        self.folder, self.online, self.fetched = folder, online, []

    def list_repo_files(self, name: str, revision: str | None = None) -> list[str]:
        if not self.online:
            from huggingface_hub.errors import OfflineModeIsEnabled

            raise OfflineModeIsEnabled("offline")
        return sorted(path.name for path in self.folder.iterdir())

    def snapshot_download(self, name: str, *, revision=None, allow_patterns=None, local_files_only=False) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        if local_files_only and not self.folder.exists():
            raise LocalEntryNotFoundError("not cached")
        self.fetched.append((name, revision, allow_patterns))
        return str(self.folder)

    def install(self, monkeypatch) -> Hub:
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        return self


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    pytest.importorskip("huggingface_hub", reason="ids of the hub need huggingface_hub")
    folder = tmp_path / "repository"
    folder.mkdir()
    shards(folder, "safetensors")
    torch.save(TENSORS, folder / "pytorch_model.bin")
    for name in ("config.json", "tokenizer.json", "vocab.txt", "README.md", "tf_model.h5", "flax_model.msgpack"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(("name", "asked"), [("org/name", ("org/name", None)), ("org/name@v1", ("org/name", "v1")),
                                             ("hf:gpt2", ("gpt2", None))])  # fmt: skip
def test_a_hub_id_fetches_what_it_needs(repository, monkeypatch, name, asked):
    fake = Hub(repository).install(monkeypatch)
    source = open_source(name)
    assert same(source)
    assert source.origin == name
    ((repo, revision, files),) = fake.fetched
    assert (repo, revision) == asked
    assert files == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "vocab.txt",
    ]  # fmt: skip


def test_offline_the_cache_counts(repository, monkeypatch):
    Hub(repository, online=False).install(monkeypatch)
    assert same(open_source("org/name"))
    Hub(repository / "nothing", online=False).install(monkeypatch)
    with pytest.raises(
        FileNotFoundError, match=r"org/name is neither .* in the local cache .*offline.*hf download org/name"
    ):
        open_source("org/name")


def test_offline_mode_of_the_library_is_honoured(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="ids of the hub need huggingface_hub")
    code = (
        "from mmformer.checkpoints.source import open_source\n"
        "try: open_source('org/absent')\n"
        "except FileNotFoundError as error: print(error)"
    )
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PATH": "/usr/bin",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=170)
    assert "org/absent is neither a file or folder here, nor in the local cache" in done.stdout, done.stderr


def test_pickles_are_fetched_only_where_there_is_nothing_else():
    names = ["pytorch_model.bin", "config.json", "onnx/model.onnx", "README.md"]
    assert hub.wanted_files(names) == ["config.json", "pytorch_model.bin"]
    assert hub.wanted_files([*names, "model.safetensors"]) == ["config.json", "model.safetensors"]
    assert hub.wanted_files([*names, "sub.pt"], "sub.pt") == ["config.json", "sub.pt"]
    with pytest.raises(FileNotFoundError, match=r"no weights of a known name among a\.gguf"):
        hub.wanted_files(["a.gguf"])


def test_an_artefact_of_the_tracker(tmp_path, monkeypatch):
    save_file(TENSORS, tmp_path / "model.safetensors")
    asked = []

    class Api:
        def artifact(self, name):
            asked.append(name)
            if name.endswith("absent:v1"):
                raise ValueError("artifact membership not found")
            return types.SimpleNamespace(download=lambda: str(tmp_path))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Api=Api))
    source = open_source("wandb:entity/project/model-x:v3")
    assert same(source)
    assert source.origin == "wandb:entity/project/model-x:v3"
    assert asked == ["entity/project/model-x:v3"]
    with pytest.raises(FileNotFoundError, match=r"wandb:e/p/absent:v1 cannot be fetched: .*not found.*entity/project"):
        open_source("wandb:e/p/absent:v1")


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("org/name", "huggingface_hub", r"pip install 'mmformer\[hub\]'"),
        ("wandb:e/p/n:v1", "wandb", "pip install wandb"),
    ],
)
def test_an_absent_library_is_named(name, module, remedy, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=remedy):
        open_source(name)
