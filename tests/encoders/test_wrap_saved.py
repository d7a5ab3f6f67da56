"""A model with wrapped backbones reopens from its folder alone, the weights they began with gone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mmformer.batch import Batch, Ragged
from mmformer.checkpoints import build, load_model, save_model
from mmformer.encoders.wrap import standalone
from tests.encoders.wrapping import shaken
from tests.test_configs import complaints, composed

timm = pytest.importorskip("timm", reason="needs the extra [timm]")
transformers = pytest.importorskip("transformers", reason="needs the extra [transformers]")

WRAP = "mmformer.encoders.wrap"
BERT = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 61}
LLAMA = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8,
    "intermediate_size": 40, "vocab_size": 61, "tie_word_embeddings": True,
}  # fmt: skip
DAC = {
    "model_type": "dac", "encoder_hidden_size": 4, "downsampling_ratios": [4, 2], "decoder_hidden_size": 16,
    "upsampling_ratios": [2, 4], "n_codebooks": 3, "codebook_size": 16, "codebook_dim": 5, "hidden_size": 16,
}  # fmt: skip
VIT = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3, "dynamic_img_size": True}


@pytest.fixture
def config(tmp_path):
    """A model whose parts begin with weights of other libraries, in folders of this test."""
    bert = shaken(transformers.BertModel(transformers.BertConfig(**BERT)))
    bert.save_pretrained(tmp_path / "bert")
    llama = shaken(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))
    llama.save_pretrained(tmp_path / "llama")
    vit = shaken(timm.create_model("vit_tiny_patch16_224", **VIT))
    timm.models.save_for_hf(vit, tmp_path / "vit", model_args=VIT)
    encoder = "mmformer.encoders.Encoder"
    return {
        "_target_": "mmformer.model.Model",
        "encoders": {
            "text": {
                "_target_": f"{WRAP}.Transformers", "dim": 24, "config": {}, "weights": str(tmp_path / "bert"),
                "input": {"_target_": f"{WRAP}.TextInput"},
            },
            "image": {
                "_target_": encoder,
                "embedder": {
                    "_target_": f"{WRAP}.Timm", "dim": 24, "name": None, "options": {},
                    "weights": str(tmp_path / "vit"), "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1],
                },
            },
            "audio": {
                "_target_": encoder,
                "embedder": {
                    "_target_": "mmformer.encoders.CodeEmbedder", "dim": 24, "sizes": [16, 16], "modality": "audio",
                    "axes": ["time", "column"],
                    "codec": {"_target_": f"{WRAP}.AudioCodec", "config": DAC, "num_codebooks": 2, "weights": None},
                },
            },
        },
        "fusion": {
            "_target_": "mmformer.fusion.Fusion", "dim": 24, "stream": ["image", "audio", "text"], "sequential": True,
            "transformer": {
                "_target_": f"{WRAP}.LanguageModel", "config": {}, "weights": str(tmp_path / "llama"),
            },
            "pool": {"_target_": "mmformer.pooling.MeanPool"},
        },
    }  # fmt: skip


def test_a_model_reopens_without_the_weights_it_began_with(config, tmp_path):
    model = shaken(build(config), seed=1)
    batch = Batch(
        ids=("a", "b"),
        inputs={
            "text": Ragged.stack([torch.randint(2, 61, (5,)), torch.randint(2, 61, (3,))], [0, 1]),
            "image": Ragged.stack([torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8)], [1], 1),
            "audio": Ragged.stack([torch.randn(96)], [0]),
        },
    )
    for name in ("bert", "vit", "llama"):
        shutil.rmtree(tmp_path / name)
    save_model(tmp_path / "model", model, {"model": config})
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    loaded = load_model(tmp_path / "model").model
    with torch.inference_mode():
        wanted, found = model.fuse(model.encode(batch)), loaded.fuse(loaded.encode(batch))
    assert torch.equal(found.x, wanted.x)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    save_model(tmp_path / "again", loaded, load_model(tmp_path / "model").config)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == load_model(tmp_path / "model").config


def test_only_wrapped_backbones_are_described_anew(config):
    model = build(config)
    described = standalone(config, model)
    assert described["fusion"]["pool"] == config["fusion"]["pool"]
    assert described["encoders"]["audio"]["embedder"]["sizes"] == [16, 16]
    assert described["encoders"]["image"]["embedder"]["name"] == "vit_tiny_patch16_224"
    assert described["encoders"]["text"]["config"]["model_type"] == "bert"
    assert described["encoders"]["text"]["input"] == config["encoders"]["text"]["input"]
    assert config["encoders"]["text"]["config"] == {}, "the config that was given must not change"
    elsewhere = {**config, "encoders": {**config["encoders"], "speech": config["encoders"]["text"]}}
    with pytest.raises(ValueError, match=r"encoders\.speech came from the weights .*bert.*: give its architecture"):
        standalone(elsewhere, model)


WRAPPED = ["image_timm", "image_torchvision", "image_transformers", "text_transformers", "audio_transformers",
           "audio_torchaudio"]  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_a_config_composes_and_says_nothing_twice(name):
    others = [other for other in ("text", "image", "audio") if other != name.partition("_")[0]]
    config = composed(f"encoder@module.model.encoders=[{','.join([name, *others])}]")
    assert not list(complaints(config))
