"""LoRA through peft: nothing at the start, only adapters train and are saved, merged it is the plain model."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch

from mmformer.checkpoints import load_model, save_model
from mmformer.encoders import Encoder, TextEmbedder
from mmformer.heads import Head
from mmformer.model import Model
from mmformer.nn import Attention, Block, Transformer
from mmformer.training.adapters import Lora, merge, merged, unmerge
from mmformer.training.checkpointing import load_whole
from mmformer.training.finetune import Finetune
from tests.campaign.kill_resume import Case, forked, straight, train
from tests.helpers import random_batch, small_model
from tests.test_resume import KillAt
from tests.training.test_finetune import fit
from tests.training.toy import digest, toy_training

pytest.importorskip("peft", reason="LoRA is tested against peft: pip install mmformer[peft]")


def lora(targets=("*.layers.*",), dropout=0.1, rank=4) -> Lora:
    return Lora(rank=rank, alpha=8, dropout=dropout, targets=targets)


def finetune(**options) -> Finetune:
    return Finetune(freeze=["*"], train=["heads.*"], unfreeze=[], adapters=lora(**options))


def adapted(kind="cross") -> Model:
    """All parameters of the adapters random, so that they change every layer they stand in."""
    model = small_model(kind)
    finetune().apply(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def answers(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.output(model.encode(random_batch()), "answer")[0]


def test_new_adapters_change_nothing_and_stand_beside_the_linear_maps_of_layers():
    plain, model = small_model("cross").eval(), small_model("cross")
    finetune().apply(model)
    model.eval()
    assert torch.equal(answers(model), answers(plain))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {"heads.answer.out.weight", "heads.answer.out.bias"}
    beside = {name.split(".lora_")[0].split(".")[-1] for name in trained if ".lora_" in name}
    assert beside == {"qkv", "query", "key_value", "out", "up", "down"}
    assert all(".layers." in name for name in trained if ".lora_" in name)


def test_merged_equals_unmerged_and_can_be_taken_back():
    model = adapted()
    before, weights = answers(model), digest(model)
    assert (before - answers(small_model("cross").eval())).abs().max() > 1e-2
    plain = merged(model)
    assert digest(model) == weights  # a copy was merged
    assert list(plain.state_dict()) == list(small_model("cross").state_dict())
    assert torch.allclose(answers(plain), before, rtol=1e-6, atol=1e-6)
    merge(model)
    assert torch.allclose(answers(model), before, rtol=1e-6, atol=1e-6)
    unmerge(model)
    assert torch.allclose(answers(model), before, rtol=1e-6, atol=1e-6)


def test_merging_is_the_sum_written_out():
    model = adapted()
    layer = model.get_submodule("fusion.transformer.layers.1.cross.key_value")
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + 8 / 4 * high @ low
    found = merged(model).get_submodule("fusion.transformer.layers.1.cross.key_value").weight
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_merged_model_shares_what_has_no_adapter_and_without_adapters_it_is_the_model():
    model = adapted()
    plain = merged(model)
    assert plain.get_parameter("fusion.latents") is model.get_parameter("fusion.latents")
    without = small_model()
    assert merged(without) is without


@pytest.mark.parametrize(
    ("targets", "message"), [(["*.blocks.*"], r"'\*.blocks.\*' matches no linear map; there are \d+: encoders")]
)
def test_a_target_that_is_not_there_is_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        finetune(targets=targets).apply(small_model())


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("mmformer.training.adapters.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'mmformer\[peft\]'"):
        lora()


def test_adapters_are_a_function_of_the_seed():
    modules = []
    for noise in (0, 1):
        modules.append(toy_training(finetune=finetune()))
        torch.manual_seed(noise)
        modules[-1].prepare()
    assert digest(modules[0]) == digest(modules[1])


# ---------------------------------------------------------------------- a run


def large_training(adapters: Finetune | None):
    """The toy's data through a text encoder of 12 layers."""
    module = toy_training(finetune=adapters)
    layers = Transformer(64, 12, [partial(Block, attention=partial(Attention, num_heads=2))])
    encoders = {"text": Encoder(TextEmbedder(64, 3), [layers])}
    module.model = Model(encoders, None, {"answer": Head(64, 3)})
    module.objectives["answer"].source = "text"
    return module


def test_checkpoints_hold_only_what_trains(tmp_path):
    fit(tmp_path / "full", large_training(None), steps=6)
    module = large_training(finetune())
    before = {name: t.clone() for name, t in module.model.state_dict().items()}
    trainer = fit(tmp_path / "lora", module, steps=6)
    size = {run: (tmp_path / run / "checkpoints" / "last.ckpt").stat().st_size for run in ("full", "lora")}
    assert size["lora"] < 0.1 * size["full"]
    (file,) = (tmp_path / "lora" / "checkpoints").glob("frozen-*.pt")
    weights = 4 * sum(t.numel() for name, t in before.items() if not name.startswith("heads"))
    assert weights < file.stat().st_size < 1.2 * weights
    for name, tensor in merged_names(module).items():
        assert torch.equal(tensor, before[name]) != name.startswith("heads")
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    assert {id(p) for p in trainer.optimizers[0].state} == trained
    read = load_whole(tmp_path / "lora" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.equal(read[name], tensor) for name, tensor in module.state_dict().items())


def merged_names(module) -> dict[str, torch.Tensor]:
    """The base weights under their names of before."""
    state = module.model.state_dict()
    return {name.replace(".base_layer", ""): t for name, t in state.items() if ".lora_" not in name}


def with_lora(ema=None):
    return toy_training(ema, finetune=finetune())


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_killed_run_with_adapters_goes_on_bit_for_bit(tmp_path, ema):
    case = Case(make=with_lora, ema=ema)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    expected, _ = straight(tmp_path / "whole", case)
    assert forked(lambda: train(tmp_path / "killed", case, 0, [KillAt("on_train_batch_start", 8).callback()]))
    assert forked(lambda: train(tmp_path / "killed", case, 0)) == 0
    assert (tmp_path / "killed" / "result.json").read_text() == (tmp_path / "whole" / "result.json").read_text()
    assert expected["step"] == 14


SMALL = {
    "_target_": "mmformer.model.Model",
    "encoders": {
        "text": {
            "_target_": "mmformer.encoders.Encoder",
            "embedder": {"_target_": "mmformer.encoders.TextEmbedder", "dim": 8, "vocab_size": 50},
            "stages": [
                {
                    "_target_": "mmformer.nn.Transformer",
                    "dim": 8,
                    "depth": 2,
                    "layers": [
                        {
                            "_target_": "mmformer.nn.Block",
                            "_partial_": True,
                            "attention": {"_target_": "mmformer.nn.Attention", "_partial_": True, "num_heads": 2},
                        }
                    ],
                }
            ],
        }
    },
    "heads": {"answer": {"_target_": "mmformer.heads.Head", "dim": 8, "num_outputs": 3}},
}

FRESH = """
import sys
sys.modules["peft"] = None  # importing it fails
import torch
from mmformer.checkpoints import load_model
from tests.helpers import random_batch
model = load_model(sys.argv[1]).model
torch.save(model.output(model.encode(random_batch()), "answer", "text")[0], sys.argv[2])
"""


def test_a_saved_model_is_merged_and_opens_in_a_fresh_process_without_peft(tmp_path):
    from hydra.utils import instantiate

    model = instantiate(SMALL, _convert_="all")
    finetune().apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.eval()
    save_model(tmp_path / "model", merged(model), {"model": SMALL})
    command = [sys.executable, "-c", FRESH, str(tmp_path / "model"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True)
    with torch.no_grad():
        expected = model.output(model.encode(random_batch()), "answer", "text")[0]
    assert torch.allclose(torch.load(tmp_path / "out.pt"), expected, rtol=1e-5, atol=1e-5)
    assert list(load_model(tmp_path / "model").model.state_dict()) == list(merged(model).state_dict())
